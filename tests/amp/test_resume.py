"""A run that stops at any step and goes on in a new process is the run that did not stop."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.errors import StateMismatchError
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_norm_net
from tests.amp.test_capture import decided
from tests.amp.test_skipped_step import assert_identical, frozen_copy

pytestmark = pytest.mark.usefixtures("ending")

TOTAL = 44


def start(settings: dict[str, Any], optimizer_name: str) -> Recorded:
    model = make_norm_net()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL)
    return Recorded(
        MixedPrecisionConfig(**settings), model, optimizer, scheduler=scheduler, scheduler_interval="step"
    )


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"precision_level": "fp16", "scale_window": 4, "max_scale": 2.0**30, "hysteresis": 2}, "adamw"),
        ({"precision_level": "fp16", "scale_window": 4, "max_scale": 2.0**30}, "sgd-momentum-fused"),
        ({"precision_level": "bf16"}, "adamw-fused"),
        ({"mode": "gradient_scaling", "precision_level": "fp32", "scale_window": 3}, "adagrad"),
    ],
)
def test_resume_is_bit_exact_at_every_step(settings: dict[str, Any], optimizer: str) -> None:
    batches = make_batches(TOTAL)
    batches[20][0][0, 0] = float("nan")
    torch.manual_seed(11)
    straight = start(settings, optimizer)
    torch.manual_seed(12)
    expected = straight.run(batches)
    for stop in (1, 20, 21, 32, 43):
        torch.manual_seed(11)
        first = start(settings, optimizer)
        torch.manual_seed(12)
        first.run(batches[:stop])
        file = io.BytesIO()
        torch.save({"trainer": first.trainer.state_dict(), "rng": torch.get_rng_state()}, file)
        torch.manual_seed(99)
        second = start(settings, optimizer)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert second.trainer.load_state_dict(saved["trainer"]) == []
        torch.set_rng_state(saved["rng"])
        rows = second.run(batches[stop:])
        for mine, theirs in zip(rows, expected[stop:], strict=True):
            for field in (
                "step",
                "loss",
                "scale",
                "overflow",
                "nan",
                "underflow",
                "grad_norm",
                "learning_rate",
            ):
                assert repr(getattr(mine, field)) == repr(getattr(theirs, field)), (stop, mine.step, field)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[name], value), (stop, name)
        theirs_stats = straight.trainer.get_mixed_precision_stats()
        mine_stats = second.trainer.get_mixed_precision_stats()
        for key in ("current_step", "current_scale", "overflow_count", "nan_count", "average_scale"):
            assert mine_stats[key] == theirs_stats[key]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum-fused"])
def test_a_run_that_goes_back_to_a_saved_state_forgets_what_came_after(optimizer: str) -> None:
    settings = {"precision_level": "fp16", "scale_window": 4, "max_scale": 2.0**30}
    batches = make_batches(TOTAL)
    straight, back = start(settings, optimizer), start(settings, optimizer)
    torch.manual_seed(12)
    straight.run(batches)
    torch.manual_seed(12)
    back.run(batches[:20])
    saved, generator = copy.deepcopy(back.trainer.state_dict()), torch.get_rng_state()
    for batch in batches[20:35]:  # read at step 32, and three more that are not
        back.trainer.train_step(*batch)
    assert back.rows[-1].step == 32
    back.trainer.load_state_dict(saved)
    torch.set_rng_state(generator)
    rows = back.run(batches[20:])[32:]
    assert [decided(row) for row in rows] == [decided(row) for row in straight.rows[20:]]
    assert_identical(frozen_copy(back), frozen_copy(straight))
    ours, theirs = (run.trainer.state_dict() for run in (back, straight))
    assert_identical(ours["schedule"], theirs["schedule"])
    assert_identical(ours["optimizer"], theirs["optimizer"])


# Torch says so of any scheduler that a new process steps first; the step before it was another process's.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(("applied", "rate"), [(True, 5e-3), (False, 1e-2)])
def test_whether_an_epoch_has_an_applied_step_is_saved(applied: bool, rate: float) -> None:
    def begin() -> Recorded:
        model = make_norm_net()
        optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return Recorded(MixedPrecisionConfig(precision_level="bf16"), model, optimizer, scheduler=scheduler)

    ((data, target),) = make_batches(1)
    first, second = begin(), begin()
    first.run([(data if applied else data * float("nan"), target)])
    second.trainer.load_state_dict(copy.deepcopy(first.trainer.state_dict()))
    second.trainer.end_epoch()
    assert second.optimizer.param_groups[0]["lr"] == rate


def test_saved_mixed_precision_state_is_tensors_and_primitives(tmp_path: Path) -> None:
    settings = {"precision_level": "fp16", "initial_scale": 2.0**40, "max_scale": 2.0**40}
    first = start(settings, "adamw")
    first.run(make_batches(10))
    path = tmp_path / "state.pt"
    first.trainer.save_mixed_precision_state(path)
    assert torch.load(path, weights_only=True)["format"] == 1
    second = start({**settings, "scale_window": 7}, "adamw")
    differences = second.trainer.load_mixed_precision_state(str(path))
    assert differences == ["scale_window: saved 2000, running 7"]
    for key in ("current_step", "current_scale", "overflow_count", "last_overflow"):
        mine, theirs = (run.trainer.get_mixed_precision_stats()[key] for run in (second, first))
        assert mine == theirs


def test_a_state_of_another_format_or_precision_is_refused(tmp_path: Path) -> None:
    run = start({"precision_level": "fp16"}, "adamw")
    path = tmp_path / "state.pt"
    run.trainer.save_mixed_precision_state(path)
    with pytest.raises(StateMismatchError, match="computed in float16"):
        start({"precision_level": "bf16"}, "adamw").trainer.load_mixed_precision_state(path)
    torch.save({"format": 99}, path)
    with pytest.raises(StateMismatchError, match="format 99"):
        run.trainer.load_mixed_precision_state(path)
