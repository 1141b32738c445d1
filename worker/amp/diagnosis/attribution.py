"""Where a step's first non-finite value came from: the step is repeated under watch, on unchanged weights.

Repeated once as it was, it names the first module with clean input and non-finite output, or the first whose
gradient turned non-finite on the way back. Repeated once more in FP32 it tells precision from data and
model. When the step is repeated, and what is told about it, is not decided here.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfstep.worker.amp.batches import map_tensors, tensors_of
from halfstep.worker.amp.policies import PrecisionPolicy
from halfstep.worker.amp.record.rows import Attribution

logger = logging.getLogger(__name__)

Role = Literal["output", "input"]


@dataclass(frozen=True, slots=True)
class Repeated:
    """A step as it was run: enough to run it again.

    Attributes:
        micro_batches: (input, target) on the device.
        scale: the loss scale, float32 and 0-d, or a number.
    """

    micro_batches: Sequence[tuple[Any, Any]]
    scale: Tensor | float


class Tracer:
    """Repeats steps of one model. The caller restores buffers and random number generators around it."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        policy: PrecisionPolicy,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._model = model
        self._criterion = criterion
        self._policy = policy
        self._parameters = parameters

    def first_non_finite(self, step: Repeated) -> Attribution | None:
        """Name the module; None where the repeated step is finite or cannot be watched."""
        watch = _Watch()
        try:
            with watch.on(self._model):
                losses = self._run(step, scaled=True)
        except (RuntimeError, TypeError, ValueError) as error:
            logger.warning("a skipped step could not be repeated under watch: %s", error)
            return None
        found = watch.forward or self._in_loss(losses) or watch.backward()
        return found or self._in_weight_gradients(watch.largest_back)

    def in_full_precision(self, step: Repeated) -> Literal["precision", "data_or_model"] | None:
        """Whether the step is finite in FP32 without a scale; None where it cannot be run so."""
        try:
            with self._policy.full_precision():
                losses = self._run(step, scaled=False)
                gradients = [p.grad for p in self._parameters if p.grad is not None]
                finite = all(_finite(tensor) for tensor in (*losses, *gradients))
        except (RuntimeError, TypeError, ValueError) as error:
            logger.warning("a skipped step could not be repeated in FP32: %s", error)
            return None
        return "precision" if finite else "data_or_model"

    def release(self) -> None:
        """Free the gradients that repeating a step has left."""
        for parameter in (*self._parameters, *self._model.parameters()):
            parameter.grad = None
        self._policy.release_gradients()

    @torch.enable_grad()
    def _run(self, step: Repeated, *, scaled: bool) -> list[Tensor]:
        self.release()
        losses = []
        for data, target in step.micro_batches:
            if scaled:
                with self._policy.region():
                    loss = self._loss(data, target)
            else:
                loss = self._loss(data, target)
            losses.append(loss.detach())
            share = loss.float() / len(step.micro_batches)
            (share * step.scale if scaled else share).backward()  # type: ignore[no-untyped-call]  # torch's own
            self._policy.collect_gradients()
        return losses

    def _loss(self, data: Any, target: Any) -> Tensor:
        output = self._model(self._policy.cast_input(data))
        return self._criterion(self._policy.cast_output(output), target).reshape(())

    def _in_loss(self, losses: Sequence[Tensor]) -> Attribution | None:
        if all(_finite(loss) for loss in losses):
            return None
        return Attribution(layer="criterion", kind="forward", where="output")

    def _in_weight_gradients(self, largest: float) -> Attribution | None:
        bad = [
            name.rpartition(".")[0] or name
            for name, parameter in self._model.named_parameters()
            if (gradient := self._policy.optimized(parameter).grad) is not None and not _finite(gradient)
        ]
        if not bad:
            return None
        return Attribution(layer=bad[-1], kind="backward", where="weights", largest_finite=largest)


class _Watch:
    """What went through each module of a model, forward and back."""

    def __init__(self) -> None:
        self.forward: Attribution | None = None
        self._largest = 0.0
        self._back: list[tuple[str, Role, bool]] = []
        self.largest_back = 0.0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch every module but the model itself while the context is open."""
        handles = []
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self) -> Attribution | None:
        """The first module on the way back whose gradient was not finite."""
        for position, (name, role, finite) in enumerate(self._back):
            if finite:
                continue
            if role == "input":
                return self._backward_at(name, "grad_input")
            # A gradient that arrives spoilt arrives at a block first, then at the block's last layer.
            innermost = name
            for inner, inner_role, inner_finite in self._back[position + 1 :]:
                if inner_role != "output" or inner_finite or not inner.startswith(f"{innermost}."):
                    break
                innermost = inner
            return self._backward_at(innermost, "grad_output")
        return None

    def _backward_at(self, name: str, where: Literal["grad_input", "grad_output"]) -> Attribution:
        return Attribution(layer=name, kind="backward", where=where, largest_finite=self.largest_back)

    def _entering(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return self._tap(args, name, "input"), self._tap(kwargs, name, "input")

        return hook

    def _leaving(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self.forward is None:
                self._look(name, (args, kwargs), output)
            return self._tap(output, name, "output")

        return hook

    def _look(self, name: str, inputs: Any, output: Any) -> None:
        if all(_finite(tensor) for tensor in tensors_of(output)):
            self._largest = max(self._largest, *(_largest_finite(t) for t in tensors_of(output)), 0.0)
            return
        clean = all(_finite(tensor) for tensor in tensors_of(inputs))
        largest = max((_largest_finite(tensor) for tensor in tensors_of(output)), default=0.0)
        self.forward = Attribution(
            layer=name if clean else "input",
            kind="forward",
            where="output" if clean else "input",
            largest_finite=max(self._largest, largest),
        )

    def _tap(self, value: Any, name: str, role: Role) -> Any:
        def tap(tensor: Tensor) -> Tensor:
            if not (tensor.is_floating_point() and tensor.requires_grad):
                return tensor
            look = partial(self._back_through, name, role)
            tapped: Tensor = _Tap.apply(tensor, look)  # type: ignore[no-untyped-call]  # torch's own
            return tapped

        return map_tensors(value, tap)

    def _back_through(self, name: str, role: Role, gradient: Tensor) -> None:
        self._back.append((name, role, _finite(gradient)))
        self.largest_back = max(self.largest_back, _largest_finite(gradient))


class _Tap(torch.autograd.Function):
    """The identity, with a look at the gradient. A copy, so that the next operation may work in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        ctx.look = look
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.look(gradients[0])
        return gradients[0], None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all().item())


def _largest_finite(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    values = tensor.detach().float().abs()
    values = values[torch.isfinite(values)]
    return float(values.max().item()) if values.numel() else 0.0
