"""Captured steps on a CUDA device: the eager ones to the bit, no host wait, and a clean way back."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from tests.amp.runs import OPTIMIZERS, Batch, Recorded, make_batches, make_norm_net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.real_device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

MEASURED = {
    "step_time_ms",
    "memory_usage",
    "memory_allocated_bytes",
    "memory_reserved_bytes",
    "memory_peak_bytes",
}
MODES: dict[str, dict[str, Any]] = {
    "fp16": {"precision_level": "fp16", "scale_window": 8, "initial_scale": 2.0**12, "max_scale": 2.0**60},
    "bf16": {"precision_level": "bf16"},
    "manual": {"mode": "manual", "precision_level": "fp16", "initial_scale": 256.0},
    "selective": {
        "mode": "selective",
        "precision_level": "fp16",
        "selective_layers": ["0"],
        "initial_scale": 256.0,
    },
    "gradient_scaling": {"mode": "gradient_scaling", "precision_level": "fp32"},
}


class Asking(nn.Module):
    """Asks the host about its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_norm_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x if x.sum().item() < 1e9 else -x


class Synchronising(nn.Module):
    """Waits in a way that only a recording finds out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_norm_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        torch.cuda.synchronize()
        return x


def on_gpu(batches: list[Batch]) -> list[Batch]:
    return [(data.cuda(), target.cuda()) for data, target in batches]


def start(
    capture: str, *, model: nn.Module | None = None, optimizer: str = "adamw-fused", **settings: Any
) -> Recorded:
    setup = settings.pop("setup", {})
    model = (make_norm_net() if model is None else copy.deepcopy(model)).cuda()
    made = OPTIMIZERS[optimizer](model.parameters())
    if setup.pop("by_step", False):
        setup["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=500)
        setup["scheduler_interval"] = "step"
    run = Recorded(MixedPrecisionConfig(**settings), model, made, capture=capture, **setup)
    torch.cuda.manual_seed(5)
    return run


def decided(run: Recorded) -> list[dict[str, str]]:
    return [
        {name: repr(getattr(row, name)) for name in row._fields if name not in MEASURED} for row in run.rows
    ]


def assert_same(left: Recorded, right: Recorded) -> None:
    assert decided(left) == decided(right)
    theirs = right.model.state_dict()
    for name, value in left.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def told(run: Recorded) -> list[str]:
    return [event.message for event in run.events if event.data.get("code") == "capture_unavailable"]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each replay of a graph."""
    seen: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(1)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return seen


@pytest.fixture
def eager_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-momentum-fused"])
def test_two_hundred_captured_steps_are_the_eager_ones(mode: str, optimizer: str, replays: list[int]) -> None:
    batches = on_gpu(make_batches(200))
    batches[120] = (batches[120][0] * float("nan"), batches[120][1])
    eager = start("off", optimizer=optimizer, **MODES[mode])
    eager.run(batches)
    captured = start("auto", optimizer=optimizer, **MODES[mode])
    captured.run(batches)
    assert told(captured) == []
    assert len(replays) > 60
    assert_same(captured, eager)
    if mode == "fp16":
        assert any(row.overflow for row in captured.rows[40:])


def test_rates_accumulation_and_short_batches(replays: list[int]) -> None:
    batches = on_gpu([*make_batches(200), *make_batches(1, size=5)])
    runs = []
    for capture in ("off", "auto"):
        setup = {"by_step": True, "gradient_accumulation_steps": 2}
        run = start(capture, precision_level="bf16", setup=setup)
        run.trainer.train(batches, 2)
        runs.append(run)
    assert_same(*runs)
    assert len(replays) > 100


def test_a_captured_steady_state_waits_for_nothing(replays: list[int], eager_waits: None) -> None:
    run = start("auto", precision_level="fp16", scale_window=10, max_scale=2.0**12, initial_scale=256.0)
    batches = on_gpu(make_batches(8))
    run.run(batches * 6)
    replays.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for batch in (batches * 13)[:100]:
        run.trainer.train_step(*batch)
    torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == 100
    assert run.trainer.get_mixed_precision_stats()["current_step"] == 148


@pytest.mark.parametrize("model", [Asking(), Synchronising()], ids=["asks", "synchronises"])
def test_a_step_that_cannot_be_captured_trains_on_as_if_nobody_had_tried(model: nn.Module) -> None:
    batches = on_gpu(make_batches(80))
    runs = []
    for capture in ("off", "auto"):
        run = start(capture, model=model, precision_level="bf16")
        run.run(batches)
        runs.append(run)
    assert_same(*runs)
    assert len(told(runs[1])) == 1
    # The generator that dropout draws from is not left in the middle of a recording.
    torch.nn.functional.dropout(torch.ones(8, device="cuda"), 0.5)


def test_a_captured_run_resumes_to_the_bit() -> None:
    batches = on_gpu(make_batches(140))
    straight = start("auto", **MODES["fp16"])
    straight.run(batches)
    first, second = start("auto", **MODES["fp16"]), start("auto", **MODES["fp16"])
    torch.cuda.manual_seed(5)
    first.run(batches[:90])
    saved, drawn = copy.deepcopy(first.trainer.state_dict()), torch.cuda.get_rng_state()
    second.trainer.load_state_dict(saved)
    torch.cuda.set_rng_state(drawn)
    second.run(batches[90:])
    assert decided(second) == decided(straight)[90:]


def test_a_compiled_model_is_captured(replays: list[int]) -> None:
    run = start("auto", precision_level="bf16", setup={"compile": "default"})
    rows = run.run(on_gpu(make_batches(4)) * 30)
    assert told(run) == []
    assert len(replays) > 60
    assert rows[-1].loss < rows[0].loss
