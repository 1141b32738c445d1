"""The underflow estimate bounds the rounding that it stands for, and grows with it as the scale falls."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from tests.amp.runs import Recorded, make_batches


def storage_rounding(gradients: list[torch.Tensor], scale: float) -> float:
    """The relative L2 error of storing S*g in FP16, over the elements where FP16's spacing is absolute."""
    g = torch.cat([gradient.double().flatten() for gradient in gradients])
    scaled = g * scale
    error = (scaled.float().half().double() / scale - g)[scaled.abs() < 2.0**-14]
    return float(error.norm() / g.norm())


def make_net(width: int, depth: int, gain: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for size in [12] + [width] * depth:
        layers += [nn.Linear(size, width), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(width, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(gain)
    return net


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 40),
    depth=st.integers(0, 3),
    gain=st.sampled_from([1e-2, 0.3, 1.0, 2.0]),
    exponent=st.integers(-24, 16),
    seed=st.integers(0, 10**6),
)
def test_the_estimate_is_never_below_the_rounding(
    width: int, depth: int, gain: float, exponent: int, seed: int
) -> None:
    model = make_net(width, depth, gain, seed)
    kept: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda o, *_: kept.extend(p.grad.clone() for group in o.param_groups for p in group["params"])
    )
    scale = 2.0**exponent
    config = MixedPrecisionConfig(
        precision_level="fp16", initial_scale=scale, min_scale=2.0**-30, max_grad_norm=None
    )
    run = Recorded(config, model, optimizer)
    row = run.run(make_batches(1, seed=seed))[0]
    if row.skipped:
        assert not row.underflow
        return
    if row.grad_norm == 0.0:
        assert row.underflow_estimate == math.inf
        assert row.underflow
        return
    # The norm is computed in FP32, hence the last bits.
    assert row.underflow_estimate * (1 + 1e-5) >= storage_rounding(kept, scale)
    elements = sum(gradient.numel() for gradient in kept)
    expected = math.sqrt(elements) * 2.0**-25 / (scale * row.grad_norm)
    assert math.isclose(row.underflow_estimate, expected, rel_tol=1e-5)
    assert row.underflow is (row.underflow_estimate > config.underflow_threshold)


def test_the_estimate_ranks_scales_as_the_true_error_does() -> None:
    """Rank correlation with the error of FP16 gradients against FP64 ones, as the scale falls."""
    model = make_net(32, 2, 0.3, seed=3)
    ((data, target),) = make_batches(1)
    exact_model = make_net(32, 2, 0.3, seed=3).double()
    nn.functional.cross_entropy(exact_model(data.double()), target).backward()
    exact = torch.cat([p.grad.flatten() for p in exact_model.parameters()])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    estimates, errors = [], []
    for exponent in range(8, -21, -2):
        model.load_state_dict(state)
        kept: list[torch.Tensor] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda o, *_, kept=kept: kept.extend(p.grad.clone() for p in o.param_groups[0]["params"])
        )
        config = MixedPrecisionConfig(
            precision_level="fp16", initial_scale=2.0**exponent, min_scale=2.0**-30, max_grad_norm=None
        )
        row = Recorded(config, model, optimizer).run([(data, target)])[0]
        estimates.append(row.underflow_estimate)
        error = torch.cat([gradient.double().flatten() for gradient in kept]) - exact
        errors.append(float(error.norm() / exact.norm()))
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (estimates, errors)]
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    assert correlation >= 0.9, (correlation, errors)


def test_bf16_and_fp32_have_none() -> None:
    for settings_ in ({"precision_level": "bf16"}, {"mode": "gradient_scaling", "precision_level": "fp32"}):
        model = make_net(4, 1, 1.0, seed=0)
        row = Recorded(
            MixedPrecisionConfig(**settings_), model, torch.optim.SGD(model.parameters(), lr=0.1)
        ).run(make_batches(1))[0]
        assert row.underflow_estimate == 0.0
        assert not row.underflow


@pytest.mark.usefixtures("ending")
def test_a_bad_step_does_not_underflow_and_ends_a_run_of_underflows() -> None:
    model = make_net(8, 1, 1.0, seed=0)
    config = MixedPrecisionConfig(
        precision_level="fp16", initial_scale=4.0, max_scale=4.0, underflow_threshold=1e-9
    )
    run = Recorded(
        config,
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        criterion=lambda output, target: output.float().square().mean() + target,
    )
    # The tenth loss is infinite by itself: its gradients are as small as the others'.
    batches = [
        (data, torch.tensor(math.inf if number == 10 else 0.0))
        for number, (data, _) in enumerate(make_batches(64), start=1)
    ]
    rows = run.run(batches)
    assert [row.step for row in rows if not row.underflow] == [10]
    assert rows[9].nan
    assert rows[9].underflow_estimate > 1e-9
    told = [event.step for event in run.events if event.type == "range_exhausted"]
    assert told == [10 + 32], "after 32 in a row"


def test_a_run_that_underflows_at_max_scale_is_told_to_use_bf16() -> None:
    model = make_net(8, 1, 1.0, seed=0)
    config = MixedPrecisionConfig(
        precision_level="fp16", initial_scale=4.0, max_scale=4.0, underflow_threshold=1e-9
    )
    run = Recorded(config, model, torch.optim.SGD(model.parameters(), lr=1e-3))
    run.run(make_batches(64))
    told = [event for event in run.events if event.type == "range_exhausted"]
    assert [event.step for event in told] == [32]
    assert "'bf16'" in told[0].message
    assert run.trainer.get_mixed_precision_stats()["underflow_count"] == 64
