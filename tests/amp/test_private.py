"""Private functions of torch are proved before use, and their public stand-ins give the same results."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from halfstep.worker.amp import MixedPrecisionConfig, kernels
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_norm_net


@pytest.fixture(autouse=True)
def fresh_proof() -> Iterator[None]:
    kernels.kernels.cache_clear()
    yield
    kernels.kernels.cache_clear()


def tensors(*, poison: float | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1,))]
    if poison is not None:
        made[1][2] = poison
    return made


def test_this_torch_is_used_without_stand_ins() -> None:
    found = kernels.kernels("cpu")
    assert found.fused_update_skips
    assert found.check_and_unscale is kernels._check_and_unscale
    assert found.norms is kernels._norms
    assert found.multiply is kernels._multiply
    assert found.copy is kernels._copy


@pytest.mark.parametrize("poison", [None, float("inf"), float("-inf"), float("nan")])
def test_stand_ins_give_the_same_results(poison: float | None) -> None:
    factor = torch.tensor(0.25)
    results = []
    for check in (kernels._check_and_unscale, kernels.check_and_unscale_publicly):
        found, values = torch.zeros(()), tensors(poison=poison)
        check(values, found, factor)
        results.append((found, values))
    (found, values), (public_found, public_values) = results
    assert found.item() == public_found.item() == (0.0 if poison is None else 1.0)
    for left, right in zip(values, public_values, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    for left, right in zip(kernels._norms(tensors()), kernels.norms_publicly(tensors()), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "name", ["_amp_foreach_non_finite_check_and_unscale_", "_foreach_norm", "_foreach_mul_", "_foreach_copy_"]
)
@pytest.mark.parametrize("failure", ["missing", "wrong"])
def test_a_torch_without_them_trains_the_same(
    name: str, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> Recorded:
        model = make_norm_net()
        config = MixedPrecisionConfig(precision_level="fp16", initial_scale=2.0**28, max_scale=2.0**28)
        run = Recorded(config, model, OPTIMIZERS["adamw"](model.parameters()))
        torch.manual_seed(1)
        run.run(make_batches(20))
        return run

    expected = train()
    kernels.kernels.cache_clear()

    def wrong(tensors: list[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        return [torch.zeros(()) for _ in tensors]

    # Only where the engine calls it: torch's own optimizers go on using theirs.
    replacement = wrong if failure == "wrong" else None
    proxy = Proxy({name: replacement})
    monkeypatch.setattr(kernels, "torch", proxy)
    with caplog.at_level(logging.WARNING, logger="halfstep.worker.amp.kernels"):
        found = train()
    assert "using the slower public one" in caplog.text
    assert [(row.loss, row.scale) for row in found.rows] == [(row.loss, row.scale) for row in expected.rows]
    for name_, value in expected.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name_]), name_


class Proxy:
    """torch, with some names replaced, or missing where the replacement is None."""

    def __init__(self, replaced: dict[str, Any]) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            if self._replaced[name] is None:
                raise AttributeError(name)
            return self._replaced[name]
        return getattr(torch, name)


def test_a_torch_whose_fused_optimizers_ignore_the_flag_is_read_by_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_fused_update_skips", lambda device_type: False)
    model = make_norm_net()
    run = Recorded(MixedPrecisionConfig(), model, OPTIMIZERS["adamw-fused"](model.parameters()))
    run.run(make_batches(5))
    stats = run.trainer.get_mixed_precision_stats()
    assert stats["performance_metrics"]["host_syncs_per_step"] == 1.0
