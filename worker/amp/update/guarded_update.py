"""Applying an update only where the step was good, with whatever optimizer the user brought.

torch's fused optimizers take the decision on the device. Every other one needs the host to read one number a
step. Learning rates are in `schedule`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from halfstep.worker.amp.errors import SetupError
from halfstep.worker.amp.kernels import Kernels

_FUSED_TYPES: tuple[type[Optimizer], ...] = (Adam, AdamW, Adagrad, SGD)


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter of every group, in order."""
    for group in optimizer.param_groups:
        yield from group["params"]


class GuardedUpdate:
    """Steps an optimizer, or leaves it and its parameters untouched, as a device tensor says.

    Attributes:
        on_device: the decision is taken on the device (a fused optimizer).
    """

    def __init__(self, optimizer: Optimizer, kernels: Kernels) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise SetupError(
                "optimizer: LBFGS evaluates the model several times a step, which a loss scale cannot "
                "follow; use Adam, AdamW, SGD or another optimizer whose step() takes no closure"
            )
        self._optimizer = optimizer
        self.on_device = kernels.fused_update_skips and _prepare_fused(optimizer)
        self._all_states_exist = False

    def apply(self, found: Tensor) -> bool | None:
        """Step where `found` (float32, 0-d) is 0; tells whether it did, None where only the device knows."""
        if not self.reads_host():
            self._step_with(found)
            return None
        # A host read: always for an optimizer that is not fused; for a fused one until its state exists, so
        # that a first step that overflows leaves no state behind (fused SGD would keep uninitialised
        # momentum).
        good = found.item() == 0.0
        if good:
            self.apply_good()
        return good

    def apply_good(self) -> None:
        """Step; the host knows that the step is good."""
        if self._all_states_exist:
            self._optimizer.step()
        else:
            with _unfused_where_state_is_missing(self._optimizer):
                self._optimizer.step()

    def apply_always(self) -> None:
        """Step, whatever the gradients hold."""
        self._optimizer.step()

    def reads_host(self) -> bool:
        """Whether the update depends on the host: `apply` would read the device now."""
        if not self._all_states_exist:
            parameters = list(parameters_of(self._optimizer))
            self._all_states_exist = _have_states(self._optimizer, parameters)
            if not self._all_states_exist and self.on_device:
                return not _have_states(self._optimizer, [p for p in parameters if p.grad is not None])
        return not self.on_device

    def _step_with(self, found: Tensor) -> None:
        # torch's fused optimizers look for this attribute by name; removed again, so that a step that the
        # user takes outside the engine is an ordinary one.
        self._optimizer.found_inf = found  # type: ignore[attr-defined]  # GradScaler's protocol
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.found_inf  # type: ignore[attr-defined]  # as above


def _prepare_fused(optimizer: Optimizer) -> bool:
    if type(optimizer) not in _FUSED_TYPES or not all(group.get("fused") for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        if not _fuses_correctly(group["params"]):
            group["fused"] = False
            return False
    return True


def _fuses_correctly(parameters: list[nn.Parameter]) -> bool:
    # Fused SGD on a CPU leaves FP16 and BF16 parameters as they are in whole SIMD blocks.
    return all(p.device.type != "cpu" or p.dtype not in {torch.float16, torch.bfloat16} for p in parameters)


@contextmanager
def _unfused_where_state_is_missing(optimizer: Optimizer) -> Iterator[None]:
    """Fused SGD fails where only some parameters have momentum yet; plain SGD does not."""
    late = []
    if isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            present = [
                "momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"] if p.grad is not None
            ]
            if group.get("fused") and group["momentum"] and any(present) and not all(present):
                late.append(group)
    for group in late:
        group["fused"] = False
    try:
        yield
    finally:
        for group in late:
            group["fused"] = True


def _have_states(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    if isinstance(optimizer, SGD) and all(group["momentum"] == 0 for group in optimizer.param_groups):
        return True
    return all(optimizer.state.get(parameter) for parameter in parameters)
