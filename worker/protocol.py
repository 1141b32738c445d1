"""What the Celery parent and a job's process say to each other: one JSON object a line, over two pipes.

The parent speaks on the child's standard input; the child answers on a descriptor of its own, so that
nothing a model prints can be taken for a message. Imports neither torch nor SQL.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrder:
    """Parent → child: train this job. `settings` is the worker's own, so both sides agree."""

    job_id: str
    fence: int
    attempt: int
    spec: dict[str, Any]
    settings: dict[str, Any]
    device: str
    elapsed_seconds: float
    checkpoints: list[dict[str, Any]]  # newest first: the fields of a CheckpointRef
    speeds: dict[str, dict[str, float]]  # of the device, by data type; empty: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOrder:
    """Parent → child: stop at the next step boundary."""

    why: Literal["cancel", "pause", "drain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Child → parent: torch is imported and one step taken. A worker's first one also tells what it found."""

    capability: dict[str, Any] | None
    components: list[dict[str, Any]]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Child → parent: steps happen; the stall clock starts anew."""

    step: int
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Child → parent: the record is written out and this is how it ended; the process exits next."""

    outcome: Literal["finished", "cancel", "pause", "drain", "failed", "stale"]
    step: int
    reason: dict[str, Any] | None = None  # code, message, detail where it failed


Message = RunOrder | StopOrder | Ready | Progress | Done
_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (RunOrder, StopOrder, Ready, Progress, Done)
}


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes | str) -> Message:
    """The message of one line; KeyError or ValueError on anything else."""
    fields = json.loads(line)
    return _KINDS[fields.pop("kind")](**fields)
