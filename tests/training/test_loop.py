"""The line of a run: steps once each, what is due when, and how it stops."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.worker.training.checkpoints import writing
from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.checkpoints.writing import MANIFEST_FILE, CheckpointInfo
from halfstep.worker.training.errors import StorageFailed
from halfstep.worker.training.loop import CHECKPOINTS, Outcome, StopRequest
from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256


@pytest.mark.parametrize(
    ("training", "epochs"),
    [
        ({}, [1] * 4 + [2] * 4 + [3] * 4),
        ({"epochs": None}, [1] * 4),
        ({"epochs": None, "max_steps": 6}, [1] * 4 + [2] * 2),
        ({"max_steps": 100}, [1] * 4 + [2] * 4 + [3] * 4),
        ({"batch_size": 20, "gradient_accumulation_steps": 3, "epochs": 2}, [1, 1, 2, 2]),
        ({"batch_size": 1000, "epochs": 2}, [1, 2]),
    ],
)
def test_every_step_once_with_its_epoch(tmp_path: Path, training: dict[str, Any], epochs: list[int]) -> None:
    outcome, recorder = run(job(training=training), tmp_path)
    assert outcome == Outcome(stopped=None, step=len(epochs), resumed_from=0)
    assert [row.step for row in recorder.rows] == list(range(1, len(epochs) + 1))
    assert [row.epoch for row in recorder.rows] == epochs
    assert recorder.total_steps == len(epochs)
    assert recorder.resumes == [0]


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    data = {"name": "synthetic", "params": {"samples": 64}}
    _, large = run(job(dataset=data, training={"batch_size": 32}), tmp_path / "large")
    accumulated = job(dataset=data, training={"batch_size": 8, "gradient_accumulation_steps": 4})
    _, small = run(accumulated, tmp_path / "small")
    assert [row.loss for row in small.rows] == pytest.approx([row.loss for row in large.rows], rel=1e-4)
    assert [row.grad_norm for row in small.rows] == pytest.approx(
        [row.grad_norm for row in large.rows], rel=1e-4
    )


@pytest.mark.parametrize("request_", [StopRequest.PAUSE, StopRequest.DRAIN, StopRequest.CANCEL])
def test_a_request_is_obeyed_at_the_next_boundary(tmp_path: Path, request_: StopRequest) -> None:
    outcome, recorder = run(job(), tmp_path, stop_after=5, request=request_)
    assert outcome == Outcome(stopped=request_, step=5, resumed_from=0)
    assert [row.step for row in recorder.rows] == [1, 2, 3, 4, 5]
    assert [ref.step for ref in recorder.refs] == ([] if request_ is StopRequest.CANCEL else [5])


def test_a_request_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    outcome, recorder = run(job(), tmp_path, stop_after=0, request=StopRequest.PAUSE)
    assert (outcome.step, recorder.rows, recorder.refs) == (0, [], [])


def test_the_time_limit_counts_earlier_attempts_and_keeps_a_checkpoint(tmp_path: Path) -> None:
    spec = job(training={"time_limit_seconds": 100.0})
    outcome, _ = run(spec, tmp_path, elapsed_seconds=50.0)
    assert outcome.stopped is None
    outcome, _ = run(spec, tmp_path / "late", stop_after=99, elapsed_seconds=100.0)
    assert (outcome.stopped, outcome.step) == (StopRequest.TIME_LIMIT, 0)


def test_the_time_limit_ends_a_run_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("halfstep.worker.training.loop.time.monotonic", lambda: float(next(clock)))
    outcome, recorder = run(job(training={"time_limit_seconds": 4.0, "epochs": 1000}), tmp_path)
    assert outcome.stopped is StopRequest.TIME_LIMIT
    assert 0 < outcome.step < 100
    assert recorder.refs[0].step == outcome.step == recorder.rows[-1].step


def test_a_client_that_cancels_at_the_limit_has_cancelled(tmp_path: Path) -> None:
    spec = job(training={"time_limit_seconds": 1.0})
    outcome, _ = run(spec, tmp_path, stop_after=0, request=StopRequest.CANCEL, elapsed_seconds=5.0)
    assert outcome.stopped is StopRequest.CANCEL


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    plain = {"keep_checkpoints": keep, "keep_best_checkpoint": False}
    _, recorder = run(job(training={"checkpoint_every_steps": 2, **plain}), tmp_path)
    assert [info.step for info in recorder.infos] == [2, 4, 6, 8, 10, 12]
    assert [ref.step for ref in recorder.refs] == [12, 10, 8][:keep]
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {
        ref.path.name for ref in recorder.refs
    }
    run(job(training={"epochs": 4, **plain}), tmp_path, recorder, fence=2)
    assert [ref.step for ref in recorder.refs] == [16, 12, 10][:keep]
    for ref in recorder.refs:
        load(ref)


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    _, recorder = run(job(training={"checkpoint_every_seconds": 1e-6}), tmp_path)
    assert [info.step for info in recorder.infos] == list(range(1, 13))


def test_a_checkpoint_carries_the_epoch_so_far(tmp_path: Path) -> None:
    spec = job(training={"checkpoint_every_steps": 3})
    _, recorder = run(spec, tmp_path, stop_after=5)
    run(spec, tmp_path, recorder, fence=2)
    for info in recorder.infos:
        row = recorder.rows[info.step - 1]
        losses = [r.loss for r in recorder.rows if r.epoch == row.epoch and r.step <= info.step]
        held_out: dict[str, float] = {}
        for one in recorder.evaluations:
            if one.step == info.step:
                held_out = {f"held_out_{name}": value for name, value in one.metrics.items()}
                held_out["held_out_loss"] = one.loss
        assert info.metrics == {
            **held_out,
            "epoch": row.epoch,
            "loss": row.loss,
            "average_loss": pytest.approx(sum(losses) / len(losses), rel=1e-12),
        }


def break_the_disk(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    save = writing.save

    def failing(directory: Path, fence: int, step: int, *rest: Any, **named: Any) -> CheckpointInfo:
        if step in steps:
            raise StorageFailed(f"the checkpoint of step {step} could not be written", detail={"step": step})
        return save(directory, fence, step, *rest, **named)

    monkeypatch.setattr(writing, "save", failing)


def test_a_periodic_checkpoint_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(training={"checkpoint_every_steps": 3})
    _, undisturbed = run(spec, tmp_path / "undisturbed")
    break_the_disk(monkeypatch, 6, 9)
    outcome, recorder = run(spec, tmp_path)
    assert outcome.stopped is None
    assert [info.step for info in recorder.infos] == [3, 12]
    assert [ref.step for ref in recorder.refs] == [12, 3]
    assert [data["step"] for data in recorder.coded("checkpoint_failed")] == [6, 9]
    assert same_numbers(recorder.rows, undisturbed.rows)
    assert weights_sha256(recorder) == weights_sha256(undisturbed)


def test_a_result_that_cannot_be_kept_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_disk(monkeypatch, 12)
    with pytest.raises(StorageFailed) as failure:
        run(job(), tmp_path)
    assert failure.value.code == "storage_error"


def test_what_the_observer_raises_passes_untouched(tmp_path: Path) -> None:
    class Stale(Exception):
        pass

    recorder = Recorder()

    def refuse() -> None:
        raise Stale

    recorder.on_steps = refuse
    with pytest.raises(Stale):
        run(job(), tmp_path, recorder)


def test_leftovers_of_a_killed_attempt_are_removed(tmp_path: Path) -> None:
    _, recorder = run(job(), tmp_path, stop_after=3)
    orphan = recorder.refs[0]
    recorder.refs.clear()  # killed between the disk and the record
    half = tmp_path / CHECKPOINTS / "fence-000001-step-0000000009"
    half.mkdir()
    run(job(), tmp_path, recorder, fence=2)
    assert not orphan.path.exists()
    assert not half.exists()
    assert [ref.step for ref in recorder.refs] == [12]
    assert (recorder.refs[0].path / MANIFEST_FILE).exists()


def test_live_figures_describe_the_run(tmp_path: Path) -> None:
    precision = {"precision_level": "fp16", "initial_scale": 2.0**24, "scale_window": 3}
    _, recorder = run(job(precision=precision), tmp_path, flush_seconds=0.0)
    assert len(recorder.lives) == 12
    for live, row, following in zip(recorder.lives, recorder.rows, recorder.rows[1:], strict=False):
        assert live.current_scale == following.scale
        assert live.memory_peak_bytes >= row.memory_allocated_bytes > 0
    last = recorder.lives[-1]
    times = sorted(row.step_time_ms for row in recorder.rows)
    assert (last.step_time_ms_p50, last.step_time_ms_p95, last.step_time_ms_max) == (
        times[6],
        times[11],
        times[11],
    )
    assert last.steps_per_second > 0
    assert last.samples_per_second == pytest.approx(16 * last.steps_per_second)
    overflows = [row.step for row in recorder.rows if row.overflow]
    assert last.last_overflow is not None
    assert last.last_overflow["step"] == overflows[-1]


def test_rows_are_reported_in_batches(tmp_path: Path) -> None:
    _, recorder = run(
        job(training={"epochs": 50, "evaluate_every_steps": 1000}), tmp_path, flush_seconds=1000.0
    )
    assert len(recorder.rows) == 200
    assert len(recorder.lives) == 2  # the first step at once, the rest at the end


def test_the_deterministic_switch_is_on_inside_and_put_back(tmp_path: Path) -> None:
    inside = []
    for wanted in (True, False):
        recorder = Recorder()
        recorder.on_steps = lambda: inside.append(torch.are_deterministic_algorithms_enabled())
        before = torch.are_deterministic_algorithms_enabled()
        run(job(training={"deterministic": wanted, "epochs": 1}), tmp_path / str(wanted), recorder)
        assert torch.are_deterministic_algorithms_enabled() is before
    assert set(inside[: len(inside) // 2]) == {True}
    assert set(inside[len(inside) // 2 :]) == {False}
