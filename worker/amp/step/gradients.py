"""The gradients that an optimizer is about to use: which there are, and letting go of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfstep.worker.amp.errors import StepError
from halfstep.worker.amp.record.step_record import rounding_of


class Present(NamedTuple):
    """The gradients of one step."""

    tensors: list[Tensor]
    """In the order of the parameters; the values alone of a sparse one."""
    parameters: tuple[int, ...] | None
    """Whose they are, by index; None: every parameter has one."""
    rounding: float
    """See `HostPart.rounding`, as if they were in FP16."""


class Gradients:
    """The gradients of an optimizer's parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._rounding = rounding_of(sum(parameter.numel() for parameter in parameters))

    def collect(self) -> Present:
        """Those that the backward passes have left.

        Raises:
            StepError: there are none.
        """
        tensors = []
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = parameter.grad = gradient.coalesce()
                gradient = gradient.values()
            tensors.append(gradient)
        if len(tensors) == len(self._parameters):
            return Present(tensors, None, self._rounding)
        if not tensors:
            raise StepError(
                "no parameter of the optimizer received a gradient: does the loss depend on them?"
            )
        with_one = tuple(index for index, p in enumerate(self._parameters) if p.grad is not None)
        return Present(tensors, with_one, rounding_of(sum(tensor.numel() for tensor in tensors)))

    def show(self, present: Present) -> None:
        """Put gradients that `collect` found back where they were found."""
        indices = range(len(self._parameters)) if present.parameters is None else present.parameters
        for index, tensor in zip(indices, present.tensors, strict=True):
            self._parameters[index].grad = tensor

    def release(self) -> None:
        """Free them."""
        for parameter in self._parameters:
            parameter.grad = None


def clip_factor(grad_norm: Tensor, most: float) -> Tensor:
    """What gradients are multiplied by, as torch.nn.utils.clip_grad_norm_ does it, to agree to the bit."""
    return torch.clamp(most / (grad_norm + 1e-6), max=1.0)
