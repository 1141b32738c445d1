"""A run that stops at any step and goes on in a new process is the run that did not stop."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_norm_net
from worker.amp import MixedPrecisionConfig
from worker.amp.errors import StateMismatchError

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
