"""Decisions by memory: told before they take effect, and taken alike by whoever resumes the job."""

from pathlib import Path

import pytest

from halfstep.service.contract.spec import JobSpec
from halfstep.worker.amp.record.memory import MemoryMonitor
from tests.training.jobs import Recorder, job, run


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of memory that is said to be used: the last element."""
    shares = [0.9]
    monkeypatch.setattr(MemoryMonitor, "peak_share", lambda self: shares[-1])
    return shares


def spec() -> JobSpec:
    precision = {"mode": "adaptive", "precision_level": "bf16", "adaptive_threshold": 0.5}
    return job(precision=precision, training={"epochs": 3, "checkpoint_every_steps": 2})


def dtypes(recorder: Recorder) -> list[str]:
    return [row.compute_dtype for row in recorder.rows]


def attempt(directory: Path, recorder: Recorder, *, fence: int, cut_to: int | None) -> None:
    """One attempt that goes on from the checkpoint of step `cut_to`, as after a crash; None: as recorded."""
    if cut_to is not None:
        recorder.refs = [ref for ref in recorder.refs if ref.step <= cut_to]
    told = [data for type_, _, _, data in recorder.events if type_ == "precision"]
    run(spec(), directory, recorder, fence=fence, decisions=told)


@pytest.mark.parametrize("cut_to", [0, 2], ids=["from the start", "from step 2"])
def test_a_resumed_job_decides_by_what_was_measured_first(
    tmp_path: Path, peak: list[float], cut_to: int
) -> None:
    whole, recorder = Recorder(), Recorder()
    run(spec(), tmp_path / "whole", whole)
    assert dtypes(whole) == ["float32"] * 3 + ["bfloat16"] * 9
    run(spec(), tmp_path / "cut", recorder, stop_after=4)
    peak.append(0.1)  # on the host that resumes it, all would fit
    attempt(tmp_path / "cut", recorder, fence=2, cut_to=cut_to)
    assert recorder.resumes == [0, cut_to]
    assert dtypes(recorder) == dtypes(whole)
    assert [row.loss for row in recorder.rows] == [row.loss for row in whole.rows]


def test_a_decision_is_told_before_the_step_that_it_changes(tmp_path: Path, peak: list[float]) -> None:
    recorder = Recorder()
    seen: list[int] = []
    event = recorder.event

    def told(type: str, level: str, message: str, data: object = None) -> None:  # noqa: A002 - the wire's name
        if type == "precision" and "from" in dict(data or {}):  # type: ignore[call-overload]
            seen.append(run_step[-1])
        event(type, level, message, data)  # type: ignore[arg-type]

    run_step = [0]
    recorder.event = told  # type: ignore[method-assign]
    from halfstep.worker.amp import MixedPrecisionTrainer

    train_group = MixedPrecisionTrainer.train_group

    def counted(self: MixedPrecisionTrainer, micro_batches):
        result = train_group(self, micro_batches)
        run_step.append(run_step[-1] + 1)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedPrecisionTrainer, "train_group", counted)
        run(spec(), tmp_path, recorder)
    assert seen == [2]  # while the third step ends, before the fourth begins
