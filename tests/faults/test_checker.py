"""The checker sees each kind of violation, and none in a run that went well; no process, no database."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.faults.checker import (
    CANCEL_GRACE_SECONDS,
    EXACT,
    INVARIANTS,
    Change,
    Evidence,
    Reference,
    Request,
    Saved,
    Seen,
    check,
)


def columns(last: int) -> dict[str, list[Any]]:
    return {
        name: list(range(1, last + 1)) if name == "step" else [float(n) for n in range(1, last + 1)]
        for name in EXACT
    }


def moves(job_id: str, states: list[str], *, first_fence: int = 0) -> list[Change]:
    """A job's way through `states` as the database would note it, one second each."""
    fence, found = first_fence, []
    for at, (old, new) in enumerate(pairwise(states), start=2):
        before, fence = fence, fence + (new == "starting")
        found.append(Change(float(at), job_id, "state", old, new, before, fence))
    return found


LIFE = ["queued", "starting", "running", "queued", "starting", "running", "succeeded"]


def good() -> Evidence:
    """Job `a` lost its worker once and succeeded; job `b` was cancelled while it ran."""
    a = Seen(
        state="succeeded",
        fence=2,
        attempt=2,
        max_attempts=3,
        code=None,
        variant="plain",
        states=[(state, float(at), None) for at, state in enumerate(LIFE, start=1)],
        columns=columns(4),
        checkpoints=[Saved(4, 2, "f" * 64, loads=True)],
    )
    lived = ["queued", "starting", "running", "cancelling", "cancelled"]
    b = dataclasses.replace(
        a,
        state="cancelled",
        fence=1,
        attempt=1,
        code="cancelled_by_user",
        states=[(state, float(at), None) for at, state in enumerate(lived, start=1)],
        columns=columns(2),
        checkpoints=[],
    )
    return Evidence(
        history=[
            Request(0.5, "POST", "/jobs", key="one", status=None),
            Request(0.6, "POST", "/jobs", key="one", status=202, job_id="a"),
            Request(0.7, "POST", "/jobs", key="two", status=202, job_id="b"),
            Request(3.5, "POST", "/jobs/b/cancel", status=503, job_id="b", retry_after="1"),
            Request(3.6, "POST", "/jobs/b/cancel", status=200, job_id="b"),
        ],
        jobs={"a": a, "b": b},
        keys=[("one", "a"), ("two", "b")],
        changes=[
            *moves("a", LIFE),
            *moves("b", lived),
            Change(3.2, "a", "steps", 0, 2, 1, 1, writer=1),
            Change(6.2, "a", "steps", 2, 4, 2, 2, writer=2),
            Change(6.5, "a", "checkpoint", 0, 4, 2, 2, writer=2),
        ],
        references={"plain": Reference("succeeded", None, columns(4), "f" * 64)},
    )


def job(evidence: Evidence, job_id: str = "a", **changes: Any) -> Evidence:
    changed = dataclasses.replace(evidence.jobs[job_id], **changes)
    return dataclasses.replace(evidence, jobs={**evidence.jobs, job_id: changed})


def change(evidence: Evidence, *more: Change) -> Evidence:
    return dataclasses.replace(evidence, changes=[*evidence.changes, *more])


def request(evidence: Evidence, *more: Request) -> Evidence:
    return dataclasses.replace(evidence, history=[*evidence.history, *more])


def with_column(evidence: Evidence, name: str, values: list[Any]) -> Evidence:
    return job(evidence, columns={**columns(4), name: values})


def states(*names: str) -> list[tuple[str, float, None]]:
    return [(name, float(at), None) for at, name in enumerate(names, start=1)]


SAVED = Saved(4, 2, "f" * 64, loads=True)

BROKEN: list[tuple[str, str, Callable[[Evidence], Evidence]]] = [
    (
        "acknowledged jobs end",
        "lost",
        lambda e: request(e, Request(9.0, "POST", "/jobs", key="3", status=202, job_id="c")),
    ),
    ("acknowledged jobs end", "stuck", lambda e: job(e, state="running")),
    ("acknowledged jobs end", "two ends", lambda e: job(e, states=states(*LIFE, "failed"))),
    (
        "outcomes are those of the undisturbed run",
        "failed by its faults",
        lambda e: job(e, state="failed", code="worker_lost"),
    ),
    (
        "outcomes are those of the undisturbed run",
        "cancelled by nobody",
        lambda e: job(e, state="cancelled", code="cancelled_by_user"),
    ),
    (
        "one job per key",
        "two answers",
        lambda e: request(e, Request(9.0, "POST", "/jobs", key="one", status=202, job_id="b")),
    ),
    ("one job per key", "a job without a key", lambda e: dataclasses.replace(e, keys=[("one", "a")])),
    ("steps are each there once", "a gap", lambda e: with_column(e, "step", [1, 2, 4, 5])),
    ("steps are each there once", "twice", lambda e: with_column(e, "step", [1, 2, 2, 3])),
    ("steps equal the undisturbed run", "a loss", lambda e: with_column(e, "loss", [1.0, 2.0, 3.5, 4.0])),
    ("steps equal the undisturbed run", "a scale", lambda e: with_column(e, "scale", [2.0, 2.0, 3.0, 4.0])),
    ("steps equal the undisturbed run", "too few", lambda e: job(e, columns=columns(3))),
    (
        "weights equal the undisturbed run",
        "other weights",
        lambda e: job(e, checkpoints=[Saved(4, 2, "0" * 64, loads=True)]),
    ),
    ("weights equal the undisturbed run", "no result", lambda e: job(e, checkpoints=[])),
    (
        "fences only rise",
        "back",
        lambda e: change(e, Change(7.5, "a", "state", "running", "running", 2, 1)),
    ),
    ("fences only rise", "claimed unseen", lambda e: job(e, fence=3)),
    (
        "nothing is written under an old fence",
        "steps",
        lambda e: change(e, Change(6.8, "a", "steps", 3, 4, 2, 2, writer=1)),
    ),
    (
        "nothing is written under an old fence",
        "a checkpoint",
        lambda e: change(e, Change(6.8, "a", "checkpoint", 0, 3, 2, 2, writer=1)),
    ),
    (
        "never two live leases",
        "claimed while held",
        lambda e: change(e, Change(6.8, "a", "state", "running", "starting", 2, 2)),
    ),
    (
        "never two live leases",
        "reaped too early",
        lambda e: dataclasses.replace(
            job(
                e,
                states=[
                    (name, at, "the lease of w1 ran out in attempt 1" if at == 4.0 else None)
                    for name, at, _ in e.jobs["a"].states
                ],
            ),
            changes=[
                dataclasses.replace(c, lease_until=c.at + 0.4)
                if (c.job_id, c.old, c.new) == ("a", "running", "queued")
                else c
                for c in e.changes
            ],
        ),
    ),
    (
        "what is cancelled stays so",
        "came back",
        lambda e: job(
            e, "b", states=states("queued", "starting", "running", "cancelling", "cancelled", "queued")
        ),
    ),
    (
        "what is cancelled stays so",
        "wrote after its end",
        lambda e: change(e, Change(5.5, "b", "steps", 2, 3, 1, 1, writer=1)),
    ),
    (
        "what is cancelled stays so",
        "wrote after the grace",
        lambda e: dataclasses.replace(
            change(e, Change(4.0 + CANCEL_GRACE_SECONDS, "b", "steps", 2, 3, 1, 1, writer=1)),
            jobs={
                **e.jobs,
                "b": dataclasses.replace(
                    e.jobs["b"], states=[*e.jobs["b"].states[:-1], ("cancelled", 99.0, None)]
                ),
            },
        ),
    ),
    (
        "past its first a checkpoint loads",
        "damaged",
        lambda e: job(e, checkpoints=[dataclasses.replace(SAVED, loads=False)]),
    ),
    (
        "past its first a checkpoint loads",
        "began anew",
        lambda e: change(
            e,
            Change(6.6, "a", "checkpoint", 0, 3, 2, 2, writer=2),
            Change(6.7, "a", "cut", 4, 0, 2, 2),
        ),
    ),
    (
        "the api refuses only as documented",
        "a 500",
        lambda e: request(e, Request(9.0, "GET", "/jobs/a", status=500, job_id="a")),
    ),
    (
        "the api refuses only as documented",
        "a 503 that does not say when",
        lambda e: request(e, Request(9.0, "GET", "/jobs/a", status=503, job_id="a")),
    ),
    (
        "states move along edges",
        "a leap",
        lambda e: job(e, states=states("queued", "running", "starting", "running", "succeeded")),
    ),
    (
        "states move along edges",
        "unseen by the record",
        lambda e: change(e, Change(9.0, "a", "state", "succeeded", "queued", 2, 2)),
    ),
    ("attempts are bounded", "too many", lambda e: job(e, attempt=4)),
    ("attempts are bounded", "more than claims", lambda e: job(e, "b", attempt=2)),
]


def test_a_run_that_went_well_has_no_violation() -> None:
    assert check(good()) == []


@pytest.mark.parametrize("state", ["succeeded", "cancelled"])
def test_a_cancel_without_an_answer_may_or_may_not_have_arrived(state: str) -> None:
    late = 9.0 + CANCEL_GRACE_SECONDS
    evidence = request(good(), Request(1.0, "POST", "/jobs/a/cancel", status=None, job_id="a"))
    lived = [*LIFE[:-1], *(["cancelling"] if state == "cancelled" else []), state]
    seen = [(name, at, None) for at, name in enumerate(lived[:-1], start=1)]
    evidence = job(evidence, state=state, states=[*seen, (state, late, None)])
    evidence = dataclasses.replace(
        evidence,
        changes=[
            *moves("a", lived)[:-1],
            *(each for each in good().changes if each.job_id == "b" or each.kind != "state"),
            Change(late - 1.0, "a", "steps", 4, 4, 2, 2, writer=2),
        ],
    )
    assert check(evidence) == []


@pytest.mark.parametrize(("attempt", "bounded"), [(1, True), (2, True), (3, False)])
def test_a_job_may_end_in_the_queue_after_it_lost_its_attempt(attempt: int, bounded: bool) -> None:
    lived = ["queued", "starting", "running", "queued", "cancelled"]
    seen = [(state, float(at), None) for at, state in enumerate(lived, start=1)]
    evidence = job(good(), "b", states=seen, fence=1, attempt=attempt)
    found = {violation.invariant for violation in check(evidence)}
    assert ("attempts are bounded" not in found) is bounded


@pytest.mark.parametrize(
    ("invariant", "spoil"), [(b[0], b[2]) for b in BROKEN], ids=[f"{b[0]}: {b[1]}" for b in BROKEN]
)
def test_each_violation_is_named(invariant: str, spoil: Callable[[Evidence], Evidence]) -> None:
    assert invariant in {violation.invariant for violation in check(spoil(good()))}


def test_each_invariant_is_shown_red() -> None:
    assert {name for name, _, _ in BROKEN} == set(INVARIANTS)


def test_a_job_that_was_cancelled_before_it_went_back_by_itself_has_other_steps() -> None:
    evidence = good()
    first_pass = dataclasses.replace(
        evidence.jobs["b"], variant="nan", columns=columns(2) | {"epoch": [7.0, 7.0]}
    )
    both = {**evidence.jobs, "b": first_pass}
    failed = Reference("failed", "non_finite_loss", columns(4), None)
    evidence = dataclasses.replace(
        evidence, jobs=both, references=dict(evidence.references) | {"nan": failed}
    )
    assert check(evidence) == []
    other = dataclasses.replace(failed, code="out_of_memory_host")
    found = check(dataclasses.replace(evidence, references=dict(evidence.references) | {"nan": other}))
    assert [each.invariant for each in found] == ["steps equal the undisturbed run"]
