"""Small jobs and an observer that keeps what it is told, for the tests of this directory."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfstep.service.contract.metrics import Evaluation, LiveStats, StepMetrics
from halfstep.service.contract.spec import JobSpec
from halfstep.service.files.remote import Mirror
from halfstep.worker.training.checkpoints import writing
from halfstep.worker.training.checkpoints.writing import CheckpointInfo, CheckpointRef
from halfstep.worker.training.loop import Outcome, RunConfig, StopRequest, train


def job(**blocks: Any) -> JobSpec:
    """A job of a second at most: an MLP on 64 samples, 4 steps an epoch; `training` entries are merged."""
    document: dict[str, Any] = {
        "model": {"name": "mlp", "params": {"hidden": [8]}},
        "dataset": {"name": "synthetic", "params": {"samples": 64, "held_out_samples": 10}},
        "training": {"epochs": 3, "batch_size": 16},
        "precision": {"precision_level": "fp32"},
    }
    document["training"] |= blocks.pop("training", {})
    return JobSpec.model_validate(document | blocks)


class Recorder:
    """Keeps a run's record as the store would: what lies beyond a resume is removed."""

    def __init__(self) -> None:
        self.total_steps: int | None = None
        self.resumes: list[int] = []
        self.rows: list[StepMetrics] = []
        self.lives: list[LiveStats] = []
        self.events: list[tuple[str, str, str, dict[str, Any]]] = []
        self.evaluations: list[Evaluation] = []
        self.infos: list[CheckpointInfo] = []
        self.refs: list[CheckpointRef] = []
        self.on_steps: Callable[[], None] = lambda: None
        self.mirror: Mirror | None = None

    def opened(self, *, total_steps: int | None) -> None:
        self.total_steps = total_steps

    def resumed(self, step: int) -> None:
        self.resumes.append(step)
        self.rows = [row for row in self.rows if row.step <= step]

    def steps(self, rows: Sequence[StepMetrics], live: LiveStats) -> None:
        assert rows[0].step == (self.rows[-1].step + 1 if self.rows else 1), "rows are contiguous"
        self.rows += rows
        self.lives.append(live)
        self.on_steps()

    def event(self, type: str, level: str, message: str, data: Mapping[str, Any] | None = None) -> None:  # noqa: A002 - the wire's name
        self.events.append((type, level, message, dict(data or {})))

    def evaluated(self, evaluation: Evaluation) -> None:
        assert self.rows[-1].step == evaluation.step, "what led to an evaluation is told before it"
        self.evaluations.append(evaluation)

    def checkpointed(self, info: CheckpointInfo) -> None:
        assert self.rows[-1].step == info.step, "what led to a checkpoint is told before it"
        self.infos.append(info)
        self.refs.insert(0, info.ref)

    def superseded(self, checkpoints: Sequence[CheckpointRef]) -> None:
        self.refs = [ref for ref in self.refs if ref not in checkpoints]
        writing.remove(checkpoints, self.mirror)

    def coded(self, code: str) -> list[dict[str, Any]]:
        """The data of the events with this code."""
        return [data for _, _, _, data in self.events if data.get("code") == code]


def run(
    spec: JobSpec,
    directory: Path,
    recorder: Recorder | None = None,
    *,
    stop_after: int | None = None,
    request: StopRequest = StopRequest.DRAIN,
    fence: int = 1,
    mirror: Mirror | None = None,
    **config: Any,
) -> tuple[Outcome, Recorder]:
    """One attempt, resuming from what the recorder knows; it stops by `request` after `stop_after` steps."""
    recorder = recorder if recorder is not None else Recorder()
    recorder.mirror = mirror
    boundaries = 0

    def should_stop() -> StopRequest | None:
        nonlocal boundaries
        boundaries += 1
        return request if stop_after is not None and boundaries > stop_after else None

    outcome = train(
        RunConfig(
            spec=spec,
            device="cpu",
            directory=directory,
            fence=fence,
            resume=tuple(recorder.refs),
            mirror=mirror,
            **config,
        ),
        recorder,
        should_stop,
    )
    return outcome, recorder


def weights_sha256(recorder: Recorder) -> str:
    """Of the newest checkpoint's weights, read from its file."""
    return hashlib.sha256((recorder.refs[0].path / writing.WEIGHTS_FILE).read_bytes()).hexdigest()


def same_numbers(left: Sequence[StepMetrics], right: Sequence[StepMetrics]) -> bool:
    """Every column that training decides is equal to the bit; times and memory are not compared."""

    def decided(row: StepMetrics) -> tuple[Any, ...]:
        free = {"memory_usage", "memory_allocated_bytes", "memory_reserved_bytes", "step_time_ms"}
        values = [getattr(row, name) for name in row._fields if name not in free]
        return tuple("nan" if isinstance(value, float) and math.isnan(value) else value for value in values)

    return [decided(row) for row in left] == [decided(row) for row in right]
