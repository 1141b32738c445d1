"""A value spoilt in one layer at one step is flagged at that step, found in that layer, and outlived."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.diagnosis.attribution import Tracer
from tests.amp.runs import Recorded, make_batches

MODES: dict[str, dict[str, Any]] = {
    "automatic-fp16": {"precision_level": "fp16"},
    "automatic-bf16": {"precision_level": "bf16"},
    "manual-fp16": {"mode": "manual", "precision_level": "fp16"},
    "manual-bf16": {"mode": "manual", "precision_level": "bf16"},
    "selective": {"mode": "selective", "precision_level": "bf16", "selective_layers": ["body.0"]},
    "adaptive": {"mode": "adaptive", "precision_level": "bf16", "adaptive_threshold": 0.0},
    "gradient_scaling": {"mode": "gradient_scaling", "precision_level": "fp32"},
    "fp32": {"precision_level": "fp32"},
}


class Net(nn.Module):
    """Blocks, a normalisation with buffers, dropout and an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.body = nn.Sequential(
            nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 16)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.norm(self.stem(x)))))


def start(*, fused: bool = True, **fields: Any) -> Recorded:
    torch.manual_seed(0)
    model = Net()
    return Recorded(
        MixedPrecisionConfig(**fields), model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    )


def spoil(run: Recorded, layer: str, direction: str, value: float, steps: set[int]) -> None:
    """Multiply one element of a layer's output, or of its output's gradient, by `value` in these steps."""
    factor = torch.ones(16 if layer != "head" else 4)
    factor[1] = value

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if run.trainer.current_step + 1 not in steps:
            return None
        if direction == "forward":
            return output * factor.to(output.dtype)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor.to(gradient.dtype))
        return None

    run.model.get_submodule(layer).register_forward_hook(hook)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("layer", ["stem", "norm", "body.0", "body.3", "head"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_spoilt_layer_is_named(mode: str, layer: str, direction: str, value: float) -> None:
    run = start(**MODES[mode])
    spoil(run, layer, direction, value, {8})
    rows = run.run(make_batches(14))
    assert [row.step for row in rows if row.skipped] == [8]
    assert rows[7].overflow or rows[7].nan
    (event,) = [event for event in run.events if event.type in {"nan", "overflow"}]
    assert (event.step, event.data["layer"], event.data["kind"]) == (8, layer, direction)
    assert 0 < event.data["largest_finite"] < float("inf")
    if rows[7].overflow:
        stats = run.trainer.get_mixed_precision_stats()
        assert stats["last_overflow"] == {"step": 8, "layer": layer, "kind": direction}
    for name, value_now in run.trainer.state_dict()["model"].items():
        assert torch.isfinite(value_now).all(), name


def test_an_unfused_optimizer_is_traced_alike() -> None:
    run = start(precision_level="bf16", fused=False)
    spoil(run, "body.0", "forward", float("inf"), {3})
    run.run(make_batches(5))
    assert [e.data["layer"] for e in run.events if e.type == "nan"] == ["body.0"]


def test_repeating_a_step_leaves_no_trace() -> None:
    """The same run with a spoilt batch, once with the step repeated, once without."""

    def run_once(*, trace: bool) -> tuple[Recorded, torch.Tensor]:
        run = start(precision_level="bf16")
        if not trace:
            run.trainer.mixed_precision_manager._run.step._probe._repetitions = 10**9
        batches = make_batches(12)
        batches[5][0][0, 0] = float("nan")
        torch.manual_seed(3)
        run.run(batches)
        return run, torch.rand(4)

    (traced, draws), (untraced, plain_draws) = run_once(trace=True), run_once(trace=False)
    assert torch.equal(draws, plain_draws)
    left, right = traced.trainer.state_dict(), untraced.trainer.state_dict()
    for name, value in left["model"].items():
        assert torch.equal(value, right["model"][name]), name
    assert [row.loss for row in traced.rows if not row.nan] == [
        row.loss for row in untraced.rows if not row.nan
    ]
    (event,) = [event for event in traced.events if event.type == "nan"]
    assert (event.data["layer"], event.data["kind"]) == ("input", "forward")
    assert event.data["verdict"] == "data_or_model"
    (event,) = [event for event in untraced.events if event.type == "nan"]
    assert event.data["layer"] is None


def test_each_repetition_starts_where_the_step_did_and_none_is_felt_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a repetition draws or moves: here it ends somewhere else than the step itself did."""
    started: list[tuple[torch.Tensor, torch.Tensor]] = []

    def astray(name: str) -> None:
        repeat = getattr(Tracer, name)

        def spied(tracer: Tracer, repeated: Any) -> Any:
            started.append((torch.get_rng_state(), run.model.norm.running_mean.clone()))
            result = repeat(tracer, repeated)
            torch.rand(5)
            run.model.norm.running_mean.add_(1.0)
            return result

        monkeypatch.setattr(Tracer, name, spied)

    def after_a_bad_step() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        run.trainer.train_step(torch.full((8, 12), float("nan")), torch.zeros(8, dtype=torch.int64))
        return torch.get_rng_state(), run.model.norm.running_mean.clone()

    run = start(precision_level="bf16")
    run.model.train()
    run.trainer.mixed_precision_manager._run.step._probe._repetitions = 10**9  # not repeated
    plain = after_a_bad_step()
    run = start(precision_level="bf16")
    run.model.train()
    torch.manual_seed(3)
    before = (torch.get_rng_state(), run.model.norm.running_mean.clone())
    astray("first_non_finite")
    astray("in_full_precision")
    repeated = after_a_bad_step()
    assert len(started) == 2
    for generator, buffer in started:
        assert torch.equal(generator, before[0])
        assert torch.equal(buffer, before[1])
    for ours, untouched in zip(repeated, plain, strict=True):
        assert torch.equal(ours, untouched)


@pytest.mark.parametrize("mode", ["automatic", "manual", "selective"])
def test_the_verdict_tells_precision_from_data(mode: str) -> None:
    fields: dict[str, Any] = {"mode": mode, "precision_level": "fp16", "initial_scale": 1.0}
    if mode == "selective":
        fields["selective_layers"] = ["stem"]
    run = start(**fields)
    batches = make_batches(4)
    before = copy.deepcopy(run.trainer.state_dict()["model"])
    run.model.train()
    run.trainer.train_step(batches[0][0] * 1e6, batches[0][1])
    for name, value in run.trainer.state_dict()["model"].items():
        assert torch.equal(value, before[name]), name
    run.run(batches[1:])
    (event,) = [event for event in run.events if event.type == "nan"]
    assert event.data["kind"] == "forward"
    assert event.data["layer"] in {"stem", "input"}, "1e6 is beyond FP16, as an input and as a product"
    assert event.data["verdict"] == "precision"
    assert [row.skipped for row in run.rows] == [True, False, False, False]


def test_a_scale_that_is_too_large_is_seen_on_the_way_back() -> None:
    run = start(precision_level="fp16", initial_scale=2.0**40, max_scale=2.0**40)
    run.run(make_batches(40))
    (event,) = [event for event in run.events if event.type == "overflow"]
    assert event.step == 1
    assert event.data["kind"] == "backward"
    assert event.data["layer"] == "head"
    assert event.data["where"] == "grad_output"
    assert event.data["verdict"] == "precision"


def test_a_loss_that_is_infinite_by_itself_is_the_criterions() -> None:
    torch.manual_seed(0)
    model = Net()
    run = Recorded(
        MixedPrecisionConfig(precision_level="bf16"),
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        criterion=lambda output, target: output.float().square().mean() / target.float().mul(0).sum(),
    )
    run.run(make_batches(1))
    (event,) = [event for event in run.events if event.type == "nan"]
    assert (event.data["layer"], event.data["kind"]) == ("criterion", "forward")
    assert event.data["verdict"] == "data_or_model"


def test_what_does_not_happen_again_is_told_from_the_gradient_norms() -> None:
    run = start(precision_level="bf16")
    once = {"done": False}

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if run.trainer.current_step == 4 and not once["done"]:
            once["done"] = True
            output.register_hook(lambda gradient: gradient * float("inf"))

    run.model.body[0].register_forward_hook(hook)
    run.run(make_batches(8))
    (event,) = [event for event in run.events if event.type == "nan"]
    assert (event.data["layer"], event.data["kind"], event.data["verdict"]) == ("body.0", "backward", None)
