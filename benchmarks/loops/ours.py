"""This project's own loops: the library as a user drives it, and the loop that trains a job."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.loops.works import Setting, scratch
from halfstep.service.contract.metrics import LiveStats, StepMetrics
from halfstep.worker.amp import MixedPrecisionTrainer
from halfstep.worker.training.loop import RunConfig, StopRequest, train

_WARM_UP = 64


class Library:
    """`train_step` on one batch after another; each step's row is delivered to a listener."""

    def __init__(self, setting: Setting) -> None:
        parts = setting.parts()
        self.rows = 0
        self.trainer = MixedPrecisionTrainer(setting.spec.precision)
        self.trainer.on_step = self._count
        self.trainer.setup_training(parts.model, parts.optimizer, parts.criterion)
        self.batches = setting.batches(parts)

    def run(self, steps: int) -> float:
        before, began = self.rows, time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(*next(self.batches))
        self.trainer.flush()
        seconds = time.perf_counter() - began
        if self.rows - before != steps:
            raise RuntimeError(f"{steps} steps gave {self.rows - before} rows")
        return seconds

    def _count(self, rows: Sequence[Any]) -> None:
        self.rows += len(rows)


class Job:
    """The loop of a job, its whole record handed to an observer; the database is another thread's."""

    def __init__(self, setting: Setting) -> None:
        self.spec = setting.spec
        self.directory = scratch()

    def run(self, steps: int) -> float:
        observer, clock = _Observer(), _Clock(steps)
        config = RunConfig(spec=self.spec, device="cpu", directory=self.directory, fence=1)
        train(config, observer, clock.asked)
        seconds = time.perf_counter() - clock.began
        if observer.rows != _WARM_UP + steps:
            raise RuntimeError(f"{_WARM_UP + steps} steps gave {observer.rows} rows")
        return seconds


class _Clock:
    """Asked before each step: starts after the warm-up and ends the run after `steps` more."""

    def __init__(self, steps: int) -> None:
        self.left = _WARM_UP + steps
        self.steps = steps
        self.began = 0.0

    def asked(self) -> StopRequest | None:
        if self.left == self.steps:
            self.began = time.perf_counter()
        self.left -= 1
        return StopRequest.CANCEL if self.left < 0 else None


class _Observer:
    def __init__(self) -> None:
        self.rows = 0
        self.last: StepMetrics | None = None

    def opened(self, *, total_steps: int | None) -> None: ...
    def resumed(self, step: int) -> None: ...
    def event(self, type: str, level: str, message: str, data: Mapping[str, Any] | None = None) -> None: ...  # noqa: A002 - the protocol's
    def evaluated(self, evaluation: object) -> None: ...
    def checkpointed(self, info: object) -> None: ...
    def superseded(self, checkpoints: Sequence[object]) -> None: ...

    def steps(self, rows: Sequence[StepMetrics], live: LiveStats) -> None:
        del live
        self.rows += len(rows)
        self.last = rows[-1]


LOOPS: dict[str, Callable[[Setting], Any]] = {"ours, library": Library, "ours, job": Job}
