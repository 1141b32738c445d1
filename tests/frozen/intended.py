"""Where today's answers may differ from those of 0.1, each with its reason: the only way a difference passes.

To add one, append a `Difference` to INTENDED. It says which recorded requests it is about, and makes of the
recorded answer the one that is right today: `header`, `text` and `status` below say the usual things, and
several may be given. What the table says must be true to the byte: an entry that fits no recorded request or
changes nothing fails the test, as does an answer that differs in any other way.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.frozen.exchanges import Answer, Ask, Exchange, load
from tests.frozen.installation import DATA

Change = Callable[[Ask, Answer], Answer]
JOB = r"/jobs/[^/?]+"
"""A job's path."""


@functools.cache
def recorded() -> dict[str, list[Exchange]]:
    """What was asked of 0.1 and answered, by group."""
    return load(DATA / "answers.json.xz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is answered differently on purpose.

    Attributes:
        request: a regular expression that the whole of "METHOD /path?query" matches.
        what: what differs, in a sentence.
        why: why it should, in a sentence.
        changes: from the recorded answer to today's, in order.
        where: of the matching requests, those whose recorded answer this accepts; default: all.
    """

    request: str
    what: str
    why: str
    changes: tuple[Change, ...]
    where: Callable[[Ask, Answer], bool] = lambda _ask, _answer: True

    def covers(self, ask: Ask, answer: Answer) -> bool:
        """Whether this is about the exchange."""
        return bool(re.fullmatch(self.request, f"{ask.method} {ask.path}")) and self.where(ask, answer)

    def applied(self, ask: Ask, answer: Answer) -> Answer:
        """The answer that is right today."""
        for change in self.changes:
            answer = change(ask, answer)
        return answer


def status(value: int) -> Change:
    """The answer has another status."""
    return lambda _ask, answer: replace(answer, status=value)


def header(name: str, value: str | None) -> Change:
    """The answer has this header (name in lower case); None: it has it no longer."""

    def change(_ask: Ask, answer: Answer) -> Answer:
        others = {key: known for key, known in answer.headers.items() if key != name}
        return replace(
            answer, headers=dict(sorted((others | ({name: value} if value is not None else {})).items()))
        )

    return change


def text(old: str, new: str) -> Change:
    r"""In the body, each match of the regular expression `old` is `new` (with `\1` for groups).

    Bodies are text of one character a byte: JSON is ASCII, so what it spells as `\u00e9` stands so here too.
    """
    return lambda _ask, answer: replace(answer, body=re.sub(old, new, answer.body))


def body(value: str) -> Change:
    """The answer has this body."""
    return lambda _ask, answer: replace(answer, body=value)


def as_get(ask: Ask, _answer: Answer) -> Answer:
    """The answer to HEAD is that to GET of the same path, without the body; a stream has no length."""
    wanted = ("GET", ask.path, ask.headers)
    asked = recorded()["reads"]
    got = next(one.answer for one in asked if (one.ask.method, one.ask.path, one.ask.headers) == wanted)
    headers = dict(got.headers)
    if "event-stream" not in headers["content-type"]:
        headers["content-length"] = str(len(got.body))
    return Answer(status=got.status, headers=dict(sorted(headers.items())), body="")


def allows(*methods: str) -> tuple[Change, ...]:
    """A refused method is told these."""
    every = ", ".join(methods)
    return header("allow", every), text('; it takes .*?\\."', f'; it takes {every}."')


def _refused(_ask: Ask, answer: Answer) -> bool:
    return answer.status == 405


NOT_HEAD = "(?!HEAD)[A-Z]+ "
ALL_METHODS = "Allow names what the whole path takes, not one of its routes (RFC 9110, 10.2.1)."
_EMPTY_SPEC = (
    '{"type":"about:blank","title":"Unprocessable Entity","status":422,'
    '"detail":"The job\'s specification is not valid.","instance":"/jobs","code":"invalid_request",'
    '"errors":[{"pointer":"/model","detail":"is required"},{"pointer":"/dataset","detail":"is required"}]}'
)

INTENDED: list[Difference] = [
    Difference(
        request="HEAD (?!.*/(cancel|retry)).*",
        what="HEAD is answered wherever GET is, with the headers of GET",
        why="A client that looks before it reads was refused (RFC 9110, 9.1: GET and HEAD are always there).",
        where=_refused,
        changes=(as_get,),
    ),
    Difference(
        request=NOT_HEAD + "/jobs",
        what="the methods of the list of jobs",
        why=ALL_METHODS,
        where=_refused,
        changes=allows("GET", "HEAD", "POST"),
    ),
    Difference(
        request=NOT_HEAD + JOB,
        what="the methods of a job",
        why=ALL_METHODS,
        where=_refused,
        changes=allows("DELETE", "GET", "HEAD"),
    ),
    Difference(
        request=NOT_HEAD + f"(/components|/workers|{JOB}/(stats|events|metrics|stream|checkpoints.*))",
        what="the methods of what can only be read",
        why=ALL_METHODS,
        where=_refused,
        changes=allows("GET", "HEAD"),
    ),
    Difference(
        request="POST /jobs",
        what="the pattern of an idempotency key says how long it may be",
        why="The command line refuses an impossible key by the same pattern, and has no other limit.",
        where=lambda ask, answer: "idempotency-key" in ask.headers and "should match pattern" in answer.body,
        changes=(text(r"\\x7e\]\+\$", r"\\x7e]{1,255}$"),),
    ),
    Difference(
        request="POST /jobs",
        what="a byte order mark before a body is passed over",
        why="The document is judged, where a Python programmer's advice about an encoding was given.",
        where=lambda _ask, answer: "Unexpected UTF-8 BOM" in answer.body,
        changes=(status(422), body(_EMPTY_SPEC)),
    ),
]
