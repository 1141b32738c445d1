"""A step ends in numbers on a CPU and in tensors elsewhere: with one result, to the bit, whatever happens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.record.rows import StepRow
from halfstep.worker.amp.step import training_step
from tests.amp.runs import OPTIMIZERS, Batch, Recorded, make_batches, make_norm_net

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"precision_level": "bf16"},
    "fp32": {"precision_level": "fp32", "max_grad_norm": 0.05},
    "unclipped": {"precision_level": "fp32", "max_grad_norm": None},
    "fp16": {"precision_level": "fp16", "scale_window": 3, "initial_scale": 2.0**20, "max_scale": 2.0**40},
    "fp16-small-scale": {
        "precision_level": "fp16",
        "scale_window": 3,
        "initial_scale": 2.0**-12,
        "min_scale": 2.0**-20,
        "underflow_threshold": 1e-5,
    },
    "scaled-by-3": {
        "mode": "gradient_scaling",
        "precision_level": "fp32",
        "scale_factor": 3.0,
        "scale_window": 2,
    },
    "manual": {"mode": "manual", "precision_level": "bf16"},
    "off": {"enabled": False, "max_consecutive_skips": 100},
}


def poisoned(count: int) -> list[Batch]:
    """Batches of which some give a NaN loss, an infinite one, or gradients that are infinite alone."""
    batches = make_batches(count)
    for place, value in ((3, math.nan), (7, math.inf), (12, 1e30), (13, 1e30), (20, math.nan)):
        batches[place] = (torch.full_like(batches[place][0], value), batches[place][1])
    return batches


class Partly(nn.Module):
    """A network of which every third step leaves one layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_norm_net()
        self.extra = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self.net(data)
        return self.extra(output) if self.calls % 3 else output


def comparable(row: StepRow) -> tuple[Any, ...]:
    kept = row._replace(
        step_time_ms=0.0,
        memory_usage=0.0,
        memory_allocated_bytes=0,
        memory_reserved_bytes=0,
        memory_peak_bytes=0,
    )
    return tuple(repr(value) for value in kept)


def both(monkeypatch: pytest.MonkeyPatch, train: Callable[[], Any]) -> list[Any]:
    results = []
    for sees in (True, False):
        monkeypatch.setattr(training_step, "host_sees", lambda device, sees=sees: sees)
        torch.manual_seed(3)
        results.append(train())
    return results


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-momentum-fused", "adamw"])
@pytest.mark.parametrize("make_model", [make_norm_net, Partly])
def test_rows_weights_and_results_are_the_same(
    settings: dict[str, Any],
    optimizer: str,
    make_model: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train() -> tuple[Any, ...]:
        model = make_model()
        own = OPTIMIZERS[optimizer](model.parameters())
        run = Recorded(
            MixedPrecisionConfig(**settings),
            model,
            own,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(own, 0.99),
            scheduler_interval="step",
        )
        keys = ("loss", "current_scale", "overflow_detected", "underflow_detected", "nan_detected")
        told = []
        for batch in poisoned(40):
            result = run.trainer.train_step(*batch)
            told.append(tuple(repr(result[key]) for key in keys))
        run.trainer.flush()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        places = [(event.type, event.step, event.data.get("layer")) for event in run.events]
        return [comparable(row) for row in run.rows], told, weights, places

    (rows, told, weights, places), (other_rows, other_told, other_weights, other_places) = both(
        monkeypatch, train
    )
    assert rows == other_rows
    assert told == other_told
    assert places == other_places
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_norm_too_large_for_fp32_is_no_bad_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> StepRow:
        model = nn.Linear(4, 4)
        run = Recorded(
            MixedPrecisionConfig(precision_level="fp32"),
            model,
            OPTIMIZERS["sgd-fused"](model.parameters()),
            criterion=lambda output, target: (output * 1e25).sum(),
        )
        return run.run([(torch.ones(2, 4), torch.zeros(2))])[0]

    for row in both(monkeypatch, train):
        assert row.grad_norm == math.inf
        assert not row.skipped
        assert not row.has_inf


def test_a_streamed_step_that_ends_early_is_stretched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> tuple[Any, ...]:
        model = make_norm_net()
        run = Recorded(
            MixedPrecisionConfig(precision_level="fp16"),
            model,
            OPTIMIZERS["adamw-fused"](model.parameters()),
            gradient_accumulation_steps=4,
        )
        run.run(make_batches(7))
        run.trainer.finish_accumulation()
        run.trainer.flush()
        return [comparable(row) for row in run.rows], [p.detach().clone() for p in model.parameters()]

    (rows, weights), (other_rows, other_weights) = both(monkeypatch, train)
    assert len(rows) == 2
    assert rows == other_rows
    assert all(map(torch.equal, weights, other_weights))


@pytest.mark.parametrize("most", [1.0, 0.05, 21.8, 26.9])
def test_norms_just_below_the_most_are_clipped_alike(most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor is below 1 for some of them: 1e-6 is added to a norm, and the quotient is rounded."""
    norms = [torch.tensor(most)]
    for _ in range(8):
        norms.append(torch.nextafter(norms[-1], torch.zeros(())))

    def train() -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        run = Recorded(
            MixedPrecisionConfig(precision_level="fp32", max_grad_norm=most),
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            criterion=lambda output, _: output.sum(),
        )
        applied = []
        for norm in norms[1:]:
            with torch.no_grad():
                model.weight.zero_()
            run.trainer.train_step(norm.reshape(1, 1), torch.zeros(1))
            applied.append(-model.weight.item())
        return applied

    applied, others = both(monkeypatch, train)
    assert applied == others
    assert applied != [norm.item() for norm in norms[1:]]
