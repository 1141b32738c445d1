"""A step that an exception ends has not begun: what follows is as if it had never been tried."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp, make_norm_net
from tests.amp.test_skipped_step import assert_identical, frozen_copy

pytestmark = pytest.mark.usefixtures("ending")

BF16: dict[str, Any] = {"precision_level": "bf16"}
MANUAL: dict[str, Any] = {"mode": "manual", "precision_level": "bf16"}


class Refused(Exception):
    """What a test raises inside a step."""


def refuse(*_: object) -> None:
    raise Refused


def start(
    settings: dict[str, Any], *, make: Callable[[], nn.Module] = make_norm_net, **setup: Any
) -> Recorded:
    model = make()
    model.train()
    return Recorded(MixedPrecisionConfig(**settings), model, OPTIMIZERS["adamw"](model.parameters()), **setup)


def gradients(run: Recorded) -> list[torch.Tensor | None]:
    """Of the model's parameters and of those that the optimizer has in their places."""
    theirs = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in (*run.model.parameters(), *theirs)]


def in_forward(run: Recorded) -> Any:
    return run.model[4].register_forward_hook(refuse)


def in_backward(run: Recorded) -> Any:
    """With the gradients of the last layer already there."""

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(refuse)

    return run.model[0].register_forward_hook(hook)


def in_update(run: Recorded) -> Any:
    return run.optimizer.register_step_pre_hook(refuse)


@pytest.mark.parametrize("place", [in_forward, in_backward, in_update])
@pytest.mark.parametrize("settings", [BF16, MANUAL], ids=["automatic", "manual"])
def test_wherever_it_fails_the_step_before_is_gone_on_from(
    place: Callable[[Recorded], Any], settings: dict[str, Any]
) -> None:
    batches = make_batches(9)

    def train(fail: bool) -> Recorded:
        run = start(settings, gradient_accumulation_steps=2)
        run.run(batches[:4])
        before = frozen_copy(run)
        if fail:
            run.trainer.train_step(*batches[8])
            handle = place(run)
            with pytest.raises(Refused):
                run.trainer.train_step(*batches[8])
            handle.remove()
            assert_identical(frozen_copy(run), before)
            assert all(gradient is None for gradient in gradients(run))
        torch.manual_seed(7)
        run.run(batches[4:8])
        return run

    failed, undisturbed = train(fail=True), train(fail=False)
    assert [row.step for row in failed.rows] == [1, 2, 3, 4]
    assert [row.loss for row in failed.rows] == [row.loss for row in undisturbed.rows]
    assert_identical(frozen_copy(failed), frozen_copy(undisturbed))


@pytest.mark.parametrize("settings", [BF16, MANUAL], ids=["automatic", "manual"])
def test_gradients_that_a_caller_left_behind_are_no_part_of_a_step(settings: dict[str, Any]) -> None:
    def train(leave: bool) -> Recorded:
        run = start(settings, make=make_mlp)
        for data, target in make_batches(4):
            if leave:
                run.model(data.to(run.model[0].weight.dtype)).sum().backward()
            run.run([(data, target)])
        return run

    assert_identical(frozen_copy(train(leave=True)), frozen_copy(train(leave=False)))


def test_what_fails_after_the_update_undoes_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_batches(2)

    def train(fail: bool) -> dict[str, Any]:
        run = start(BF16)
        torch.manual_seed(7)
        run.run([first])
        if fail:
            step = run.trainer.mixed_precision_manager._run.step
            monkeypatch.setattr(step._memory, "recent", refuse)
            with pytest.raises(Refused):
                run.trainer.train_step(*second)
        else:
            run.run([second])
        return frozen_copy(run)

    assert_identical(train(fail=True), train(fail=False))
