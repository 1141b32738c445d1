"""The training of one job, from its specification to its last checkpoint.

A run is a line of step boundaries. At each one, in this order: an epoch that ended is closed, an evaluation
that is due is made, finished steps are reported, a checkpoint that is due is written, and a request to stop
is obeyed. The precision of a step is the engine's; what a step costs to report is the observer's.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.speed import Speeds
from halfstep.service.files.remote import Mirror
from halfstep.worker.amp.errors import TooManySkips
from halfstep.worker.training import randomness
from halfstep.worker.training.checkpoints.writing import CheckpointRef, remove_unreferenced
from halfstep.worker.training.data.plan import Position
from halfstep.worker.training.errors import NonFinite
from halfstep.worker.training.observer import Observer
from halfstep.worker.training.run import Run

CHECKPOINTS = "checkpoints"


class StopRequest(StrEnum):
    """Why a run is asked to stop at its next step boundary."""

    CANCEL = "cancel"
    PAUSE = "pause"
    DRAIN = "drain"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One attempt at a job.

    Attributes:
        spec: what to train.
        device: "cpu" or "cuda:N".
        directory: the job's own; checkpoints go below it.
        fence: the attempt's; part of every checkpoint's path.
        text_roots: directories that datasets may read.
        resume: checkpoints of the job, newest first; empty: from scratch.
        decisions: data of the `precision` events that earlier attempts told, in order: what they decided by
            memory is decided alike again.
        elapsed_seconds: training time that earlier attempts spent, for the time limit.
        flush_seconds: between two reports of finished steps.
        speeds: of the device, by data type, as its worker measured them; empty: nobody has.
        mirror: the remote store that keeps the checkpoints; None: `directory` does.
    """

    spec: JobSpec
    device: str
    directory: Path
    fence: int
    text_roots: Sequence[Path] = ()
    resume: Sequence[CheckpointRef] = ()
    decisions: Sequence[dict[str, Any]] = ()
    elapsed_seconds: float = 0.0
    flush_seconds: float = 0.5
    speeds: Speeds = field(default_factory=dict)
    mirror: Mirror | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, other than by a failure.

    Attributes:
        stopped: the request it obeyed; None: all steps are done.
        step: optimizer steps taken, all attempts together.
        resumed_from: the step of the checkpoint it went on from; 0: from scratch.
    """

    stopped: StopRequest | None
    step: int
    resumed_from: int


def train(config: RunConfig, observer: Observer, should_stop: Callable[[], StopRequest | None]) -> Outcome:
    """Train a job until it is done or asked to stop.

    The caller's global random number generators are seeded and used; torch's deterministic switch is put
    back.

    Raises:
        TrainingFailure: the run cannot go on; see `halfstep.worker.training.errors`.
    """
    began = time.monotonic()
    limit = config.spec.training.time_limit_seconds

    def asked() -> StopRequest | None:
        if limit is not None and config.elapsed_seconds + time.monotonic() - began >= limit:
            return should_stop() or StopRequest.TIME_LIMIT
        return should_stop()

    with randomness.deterministic(config.spec.training.deterministic):
        remove_unreferenced(
            config.directory / CHECKPOINTS, config.resume, below_fence=config.fence, mirror=config.mirror
        )
        return _attempt(config, observer, asked)


def _attempt(config: RunConfig, observer: Observer, asked: Callable[[], StopRequest | None]) -> Outcome:
    """Train; after a hopeless run of non-finite steps, once more without the batches of that run."""
    known, decisions = list(config.resume), list(config.decisions)
    excluded: frozenset[Position] = frozenset()
    while True:
        run = Run(
            config.spec,
            observer,
            device=torch.device(config.device),
            directory=config.directory / CHECKPOINTS,
            fence=config.fence,
            text_roots=config.text_roots,
            flush_seconds=config.flush_seconds,
            resume=known,
            decisions=decisions,
            excluded=excluded,
            speeds=config.speeds,
            mirror=config.mirror,
        )
        try:
            stopped = _until_done(run, asked)
        except NonFinite as failure:
            # What was seen is told before anything goes back: the next run of these steps leaves them out.
            run.tell_rows()
            if not _worth_a_rollback(config.spec, failure, run):
                raise
            known, excluded = _roll_back(run, failure, observer)
            continue
        return Outcome(stopped=stopped, step=run.step, resumed_from=run.resumed_from)


def _until_done(run: Run, asked: Callable[[], StopRequest | None]) -> StopRequest | None:
    while not run.done:
        request = asked()
        if request is not None:
            run.stop(keep=request is not StopRequest.CANCEL)
            return request
        run.take_step()
        run.pass_boundary()
    run.finish()
    return None


def _worth_a_rollback(spec: JobSpec, failure: NonFinite, run: Run) -> bool:
    """Only NaN that data may have caused, only once, and only where steps would be left."""
    cause = failure.__cause__
    if not isinstance(cause, TooManySkips) or cause.cause == "scale_exhausted":
        return False
    if not spec.precision.nan_handling or run.plan.excluded or not run.skipped:
        return False
    return run.plan.total_steps is None or run.plan.total_steps > len(run.skipped)


def _roll_back(
    run: Run, failure: NonFinite, observer: Observer
) -> tuple[list[CheckpointRef], frozenset[Position]]:
    """The checkpoints from before the run of skips, and the batches to leave out."""
    first = run.skipped[0][0]
    places = [place for _, place in run.skipped]
    known = [ref for ref in run.checkpoints if ref.step < first]
    later = [ref for ref in run.checkpoints if ref.step >= first]
    target = f"step {known[0].step}" if known else "the start"
    observer.event(
        "alert",
        "warning",
        f"{failure.message} Training goes back to {target} and leaves out the batches of the {len(places)} "
        "skipped steps; a second time it will fail.",
        {
            "code": "batches_excluded",
            "step": run.step,
            "layer": failure.detail["layer"],
            "verdict": failure.detail["verdict"],
            "batches": [[place.epoch, place.group] for place in places],
        },
    )
    if later:
        observer.superseded(later)
    return known, frozenset(places)
