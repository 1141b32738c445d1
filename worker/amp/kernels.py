"""The engine's only calls of torch's private functions, each proved on first use, each with a stand-in.

A torch release may rename or change a private function. `kernels` tries each one on a few numbers per device
type and takes the slower public equivalent where the answer is wrong, so that a result never depends on
which one ran.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Functions over lists of tensors of one device.

    Attributes:
        check_and_unscale: multiplies each tensor by a scalar tensor in place and sets `found` (float32, 0-d)
        to 1
            where an element was not finite before; leaves it alone elsewhere.
        norms: the L2 norm of each tensor, 0-d.
        multiply: multiplies each tensor by a scalar tensor in place.
        copy: copies the second list into the first.
        fused_update_skips: torch's fused optimizers leave everything unchanged where `found_inf` is 1.
    """

    check_and_unscale: Callable[[list[Tensor], Tensor, Tensor], None]
    norms: Callable[[list[Tensor]], Sequence[Tensor]]
    multiply: Callable[[list[Tensor], Tensor], None]
    copy: Callable[[list[Tensor], Sequence[Tensor]], None]
    fused_update_skips: bool


@cache
def kernels(device_type: str) -> Kernels:
    """The proved functions for a device type ("cpu" or "cuda")."""
    return Kernels(
        check_and_unscale=_proved(
            _check_and_unscale, check_and_unscale_publicly, _unscale_works, device_type
        ),
        norms=_proved(_norms, norms_publicly, _norms_work, device_type),
        multiply=_proved(_multiply, multiply_publicly, _multiply_works, device_type),
        copy=_proved(_copy, copy_publicly, _copy_works, device_type),
        fused_update_skips=_holds(_fused_update_skips, device_type),
    )


@contextmanager
def backward_compiled_at_once() -> Iterator[None]:
    """While open, torch.compile compiles a backward pass with its forward pass, where its failure is in time.

    Without it, the first backward pass compiles, when gradients and buffers have already moved.
    """
    try:
        functorch: Any = importlib.import_module("torch._functorch.config")
        patch = functorch.patch(force_non_lazy_backward_lowering=True)
    except (AttributeError, ImportError) as error:
        logger.warning("the backward pass is compiled late: %s: %s", type(error).__name__, error)
        patch = nullcontext()
    with patch:
        yield


def check_and_unscale_publicly(tensors: list[Tensor], found: Tensor, factor: Tensor) -> None:
    """`Kernels.check_and_unscale` in public functions."""
    for tensor in tensors:
        found.copy_(torch.maximum(found, (~torch.isfinite(tensor)).any().to(found.dtype)))
        tensor.mul_(factor.to(tensor.dtype))


def norms_publicly(tensors: list[Tensor]) -> Sequence[Tensor]:
    """`Kernels.norms` in public functions."""
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def multiply_publicly(tensors: list[Tensor], factor: Tensor) -> None:
    """`Kernels.multiply` in public functions."""
    for tensor in tensors:
        tensor.mul_(factor)


def copy_publicly(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
    """`Kernels.copy` in public functions."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _check_and_unscale(tensors: list[Tensor], found: Tensor, factor: Tensor) -> None:
    if tensors:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, factor)


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(tensors) if tensors else ()  # noqa: SLF001 - what this module is for


def _multiply(tensors: list[Tensor], factor: Tensor) -> None:
    if tensors:
        torch._foreach_mul_(tensors, factor)


def _copy(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, list(sources))


def _proved(private: F, public: F, works: Callable[[F, str], bool], device_type: str) -> F:
    return private if _holds(lambda device: works(private, device), device_type) else public


def _holds(claim: Callable[[str], bool], device_type: str) -> bool:
    try:
        if claim(device_type):
            return True
        reason = "gave another result than its public equivalent"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = f"raised {type(error).__name__}: {error}"
    logger.warning("a private torch function %s on %s; using the slower public one", reason, device_type)
    return False


def _unscale_works(function: Callable[[list[Tensor], Tensor, Tensor], None], device_type: str) -> bool:
    for poison, expected in ((3.0, 0.0), (float("inf"), 1.0), (float("nan"), 1.0)):
        tensors = [torch.tensor([4.0, -8.0], device=device_type), torch.tensor([poison], device=device_type)]
        found = torch.zeros((), device=device_type)
        function(tensors, found, torch.tensor(0.25, device=device_type))
        if found.item() != expected or tensors[0].tolist() != [1.0, -2.0]:
            return False
    return True


def _norms_work(function: Callable[[list[Tensor]], Sequence[Tensor]], device_type: str) -> bool:
    tensors = [torch.tensor([3.0, 4.0], device=device_type), torch.tensor([float("nan")], device=device_type)]
    first, second = function(tensors)
    return first.item() == 5.0 and bool(torch.isnan(second).item())


def _multiply_works(function: Callable[[list[Tensor], Tensor], None], device_type: str) -> bool:
    tensors = [torch.tensor([3.0], device=device_type), torch.tensor([4.0, 5.0], device=device_type)]
    function(tensors, torch.tensor(2.0, device=device_type))
    return tensors[0].tolist() == [6.0] and tensors[1].tolist() == [8.0, 10.0]


def _copy_works(function: Callable[[list[Tensor], Sequence[Tensor]], None], device_type: str) -> bool:
    source = torch.tensor([1.5, -2.0], device=device_type)
    targets = [torch.zeros(2, device=device_type), torch.zeros(2, dtype=torch.bfloat16, device=device_type)]
    function(targets, [source, source])
    return all(target.tolist() == [1.5, -2.0] for target in targets)


def _fused_update_skips(device_type: str) -> bool:
    weight = torch.nn.Parameter(torch.ones(4, device=device_type))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    for found, moved in ((0.0, True), (1.0, False), (0.0, True)):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.found_inf = torch.tensor(found, device=device_type)  # type: ignore[attr-defined]  # by name
        optimizer.step()
        if bool((weight != before).any().item()) is not moved:
            return False
    return float(optimizer.state[weight]["step"].item()) == 2.0
