"""A run that cannot go on says why, whose fault it is, and what to try next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.service.contract.states import ReasonCode
from halfstep.worker.training.components import InputKind, Kind, NoParameters, Task, register_model, registry
from halfstep.worker.training.errors import ComponentFailed, DataError, NonFinite, OutOfMemory
from halfstep.worker.training.loop import StopRequest
from tests.training.jobs import Recorder, job, run, same_numbers


class Failing(nn.Module):
    """A linear model whose training forward pass raises at its third step."""

    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__()
        self.out = nn.Linear(16, 4)
        self.fail = fail
        self.steps = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.steps == 3:
            self.fail()
        return self.out(features)


@pytest.fixture
def failing_job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    registry.load_built_in()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    def make(fail: Callable[[], None], **blocks: Any) -> Any:
        registry._registered.pop((Kind.MODEL, "failing"), None)
        register_model(
            "failing",
            NoParameters,
            summary="Fails.",
            inputs=(InputKind.FEATURES,),
            tasks=(Task.CLASSIFICATION,),
        )(lambda _parameters, _data: Failing(fail))
        return job(model={"name": "failing"}, **blocks)

    return make


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def allocate_far_too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fail", "code"),
    [
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
            "out_of_memory_device",
        ),
        (raising(MemoryError()), "out_of_memory_host"),
        (allocate_far_too_much, "out_of_memory_host"),
    ],
)
def test_out_of_memory_names_the_next_thing_to_try(
    tmp_path: Path, failing_job: Callable[..., Any], fail: Callable[[], None], code: str
) -> None:
    spec = failing_job(fail, training={"gradient_accumulation_steps": 1, "batch_size": 16})
    with pytest.raises(OutOfMemory) as failure:
        run(spec, tmp_path)
    assert failure.value.code == code
    assert "step 3 ran out of memory" in failure.value.message
    assert "batch_size 8 with gradient_accumulation_steps 2" in failure.value.message
    assert "activation_checkpointing" in failure.value.message


def test_a_components_own_error_is_told_with_its_step(
    tmp_path: Path, failing_job: Callable[..., Any]
) -> None:
    recorder = Recorder()
    with pytest.raises(ComponentFailed, match=r"step 3 failed in a component's own code: KeyError: 'layer'"):
        run(failing_job(raising(KeyError("layer"))), tmp_path, recorder)
    assert [row.step for row in recorder.rows] == [1]


def test_an_operation_without_a_deterministic_kernel(tmp_path: Path, failing_job: Callable[..., Any]) -> None:
    def fail() -> None:
        if torch.are_deterministic_algorithms_enabled():
            # What torch raises for such an operation on a GPU; a CPU has few of them.
            raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set …")

    with pytest.raises(ComponentFailed, match=r"Set training\.deterministic to false") as failure:
        run(failing_job(fail), tmp_path / "on")
    assert failure.value.detail == {"pointer": "/training/deterministic"}
    outcome, _ = run(failing_job(fail, training={"deterministic": False}), tmp_path / "off")
    assert outcome.stopped is None


def test_a_dataset_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.worker.training.data.dataset import TensorSplit

    batch = TensorSplit.batch
    calls = 0

    def failing(self: TensorSplit, indices: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(5, "Input/output error")
        return batch(self, indices)

    monkeypatch.setattr(TensorSplit, "batch", failing)
    with pytest.raises(DataError, match="could not give a batch of 16 samples"):
        run(job(), tmp_path)


def with_bad_steps(*steps: int, skips: int = 3, epochs: int = 2, **changes: Any) -> Any:
    return job(
        dataset={
            "name": "synthetic",
            "params": {"samples": 16 * 40, "held_out_samples": 8, "non_finite_steps": list(steps)},
        },
        precision={"precision_level": "bf16", "max_consecutive_skips": skips} | changes.pop("precision", {}),
        training={"epochs": epochs, "batch_size": 16} | changes.pop("training", {}),
    )


def test_a_few_bad_batches_are_skipped_and_told(tmp_path: Path) -> None:
    outcome, recorder = run(with_bad_steps(5, 6, epochs=1), tmp_path)
    assert outcome.stopped is None
    assert [row.step for row in recorder.rows if row.skipped] == [5, 6]
    assert [row.step for row in recorder.rows if row.nan] == [5, 6]
    [first] = [data for type_, _, _, data in recorder.events if type_ == "nan"]
    assert first["step"] == 5


def test_a_run_of_bad_batches_is_left_out_once(tmp_path: Path) -> None:
    """Steps 20 to 23 are bad: back to the checkpoint of step 16, and on without their batches."""
    spec = with_bad_steps(20, 21, 22, 23, epochs=1, training={"checkpoint_every_steps": 8})
    outcome, recorder = run(spec, tmp_path)
    [told] = recorder.coded("batches_excluded")
    assert told["batches"] == [[1, 19], [1, 20], [1, 21], [1, 22]]
    assert (told["layer"], told["verdict"]) == ("input", "data_or_model")
    message = next(message for kind, _, message, _ in recorder.events if kind == "alert")
    assert "20 to 22: its loss was not finite, first seen in 'input' (forward)" in message
    assert "not finite in FP32 either. Look for bad samples or lower the learning rate. Training" in message
    [incident] = recorder.coded("nan")
    assert (incident["step"], incident["batch"]) == (20, [1, 19])
    assert recorder.resumes == [0, 16]
    assert (outcome.stopped, outcome.step, recorder.total_steps) == (None, 36, 36)
    assert [row.step for row in recorder.rows] == list(range(1, 37))
    assert not any(row.skipped for row in recorder.rows)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        r.path.name for r in recorder.refs
    }


def test_without_a_checkpoint_it_goes_back_to_the_start(tmp_path: Path) -> None:
    outcome, recorder = run(with_bad_steps(20, 21, 22, 23, epochs=1), tmp_path)
    assert recorder.resumes == [0, 0]
    assert (outcome.step, len(recorder.rows)) == (36, 36)


@pytest.mark.parametrize("cut", [10, 18, 30])
def test_what_is_left_out_survives_a_resume(tmp_path: Path, cut: int) -> None:
    spec = with_bad_steps(20, 21, 22, 23, epochs=1, training={"checkpoint_every_steps": 8})
    _, whole = run(spec, tmp_path / "whole")
    recorder = Recorder()
    outcome, _ = run(spec, tmp_path / "cut", recorder, stop_after=cut, request=StopRequest.DRAIN)
    assert outcome.stopped is StopRequest.DRAIN
    run(spec, tmp_path / "cut", recorder, fence=2)
    assert same_numbers(recorder.rows, whole.rows)
    assert len(recorder.rows) == 36


def test_a_second_run_of_bad_batches_fails_the_job(tmp_path: Path) -> None:
    spec = with_bad_steps(2, 3, 4, 34, 35, 36, epochs=1)
    recorder = Recorder()
    with pytest.raises(NonFinite) as failure:
        run(spec, tmp_path, recorder)
    assert failure.value.code is ReasonCode.NON_FINITE_LOSS
    assert len(recorder.coded("batches_excluded")) == 1
    assert [row.step for row in recorder.rows if row.skipped] == [31, 32, 33]
    assert "Look for bad samples" in failure.value.message


def test_a_learning_rate_that_is_far_too_high_is_no_question_of_precision(tmp_path: Path) -> None:
    spec = job(
        precision={"precision_level": "bf16", "max_consecutive_skips": 3, "max_grad_norm": None},
        optimizer={"name": "sgd", "params": {"lr": 5000.0, "weight_decay": 0.1}},
        training={"epochs": 20},
    )
    with pytest.raises(NonFinite) as failure:
        run(spec, tmp_path)
    assert failure.value.detail["verdict"] == "data_or_model"
    assert failure.value.detail["layer"] is not None
    assert "ower the learning rate" in failure.value.message
    assert "precision_level" not in failure.value.message


def test_with_nan_handling_off_nothing_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(NonFinite) as failure:
        run(with_bad_steps(5, precision={"nan_handling": False}), tmp_path, recorder)
    assert failure.value.code is ReasonCode.NON_FINITE_LOSS
    assert failure.value.detail["step"] == 5
    assert recorder.coded("batches_excluded") == []


def test_data_that_are_all_bad_fail_the_job_and_do_not_succeed_empty(tmp_path: Path) -> None:
    spec = with_bad_steps(*range(1, 41), epochs=1)
    with pytest.raises(NonFinite):
        run(spec, tmp_path)


def test_an_exhausted_scale_is_no_fault_of_the_data(tmp_path: Path) -> None:
    precision = {
        "precision_level": "fp16",
        "min_scale": 2.0**24,
        "initial_scale": 2.0**24,
        "max_consecutive_skips": 5,
    }
    recorder = Recorder()
    with pytest.raises(NonFinite, match="min_scale") as failure:
        run(
            job(precision=precision, dataset={"name": "synthetic", "params": {"input_scale": 3000.0}}),
            tmp_path,
            recorder,
        )
    assert failure.value.code is ReasonCode.SCALE_EXHAUSTED
    assert recorder.coded("batches_excluded") == []
