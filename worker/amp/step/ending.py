"""How a step ends once its gradients are there: check, clip, guarded update, scale, row.

Twice, with one result to the bit. `DeviceEnding` is tensors from end to end: on a GPU the host never waits
in it, and a graph can hold it. `HostEnding` is for a CPU, where the device's memory is the host's own, so
that numbers cost less than tensors of one element, and a check that the norm answers need not be made. What
that is worth is in docs/decisions/0006-two-ways-to-end-a-step.md.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.kernels import Kernels
from halfstep.worker.amp.policies import PrecisionPolicy
from halfstep.worker.amp.record.ring import StepRing
from halfstep.worker.amp.step.gradients import Present, clip_factor
from halfstep.worker.amp.update.guarded_update import GuardedUpdate
from halfstep.worker.amp.update.learning_rates import Schedule
from halfstep.worker.amp.update.loss_scale import LossScale
from halfstep.worker.amp.update.snapshots import BufferGuard


class Parts(NamedTuple):
    """What a step's end acts on."""

    config: MixedPrecisionConfig
    kernels: Kernels
    scale: LossScale
    update: GuardedUpdate
    schedule: Schedule
    buffers: BufferGuard
    policy: PrecisionPolicy
    ring: StepRing


class Ended(NamedTuple):
    """What the host knows of a step that has ended."""

    row: Tensor | tuple[float, ...]
    """Its row in the ring, on the device or as numbers."""
    skipped: bool
    """The host knows that it was skipped; on a GPU it mostly knows neither."""
    host_syncs: int
    """How often the host read the device."""


class Ending(Protocol):
    """Ends a step; called without gradients of its own work."""

    def conclude(self, gradients: Present, loss: Tensor, *, stretch: float, wait: bool) -> Ended:
        """Decide whether the step is good, apply it where it is, move the scale, write the row.

        Args:
            gradients: scaled, of the whole step.
            loss: the step's unscaled loss, float32, 0-d.
            stretch: what the gradients are multiplied by besides; 1 for a step of the size announced.
            wait: the host needs to know whether the step was skipped.
        """


class DeviceEnding:
    """Everything on the device, in tensors. The host reads it only where `wait` or the optimizer asks."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        self._parts = parts
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._skip = torch.zeros((), dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._false = torch.zeros((), dtype=torch.bool, device=device)

    def conclude(self, gradients: Present, loss: Tensor, *, stretch: float, wait: bool) -> Ended:
        """See `Ending.conclude`."""
        config, kernels, scale, _, _, _, policy, ring = self._parts
        used = scale.scale.clone() if scale.active else self._one
        found = self._found.zero_()
        inverse = scale.inverse if stretch == 1 else scale.inverse * stretch
        kernels.check_and_unscale(gradients.tensors, found, inverse)
        if may_overflow_unscaling(config, stretch):
            kernels.check_and_unscale(gradients.tensors, found, self._one)
        norms = torch.stack(tuple(kernels.norms(gradients.tensors)))
        grad_norm = torch.linalg.vector_norm(norms)
        grad_bad = found > 0
        loss_bad = (loss - loss) != 0  # as ~isfinite, in two operations instead of five
        bad = grad_bad | loss_bad
        if config.max_grad_norm is not None:
            kernels.multiply(gradients.tensors, clip_factor(grad_norm, config.max_grad_norm))
        host_syncs, skipped = self._apply(bad, wait=wait)
        policy.publish_weights()
        underflow = self._false
        if policy.compute_dtype is torch.float16:
            underflow = underflows(used, grad_norm, gradients.rounding, config.underflow_threshold) & ~bad
        exhausted = scale.update(
            grad_bad=grad_bad, loss_bad=loss_bad, underflow=underflow, grad_norm=grad_norm
        )
        row = ring.append((loss, grad_norm, used, scale.scale, grad_bad, exhausted), norms)
        return Ended(row, skipped, host_syncs)

    def _apply(self, bad: Tensor, *, wait: bool) -> tuple[int, bool]:
        """Update the weights where the step was good; the host's reads, and whether it knows of a skip."""
        _, _, _, update, schedule, buffers, _, _ = self._parts
        if not self._parts.config.enabled:
            update.apply_always()
            schedule.advance()
            return 0, False
        self._skip.copy_(bad)
        host_syncs = int(update.reads_host())
        applied = update.apply(self._skip)
        if applied is None and (schedule.on_host or wait):
            applied = not bool(bad.item())
            host_syncs += 1
        schedule.advance_where(bad)
        if applied is None:
            buffers.restore_where(bad)
            return host_syncs, False
        if applied:
            schedule.advance()
        else:
            buffers.restore()
        return host_syncs, not applied


class HostEnding:
    """Tensors where there are many elements, numbers everywhere else. Nothing is read from a device."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._figures = torch.zeros(3, dtype=torch.float32)
        self._found, self._loss, self._norm = self._figures.unbind()
        self._one = torch.ones((), dtype=torch.float32)
        # Made once: numbers are read through this, never by a tensor method inside a step.
        self._seen = self._figures.numpy()

    def conclude(self, gradients: Present, loss: Tensor, *, stretch: float, wait: bool) -> Ended:
        """See `Ending.conclude`; the host knows without waiting."""
        del wait
        config, kernels, scale, update, schedule, buffers, policy, ring = self._parts
        tensors, used = gradients.tensors, scale.value
        grad_bad = False
        if used != 1 or stretch != 1:
            grad_bad = self._check(tensors, scale.inverse if stretch == 1 else scale.inverse * stretch)
        norms = torch.stack(tuple(kernels.norms(tensors)))
        grad_norm = torch.linalg.vector_norm(norms)
        self._norm.copy_(grad_norm)
        self._loss.copy_(loss)
        _, loss_value, norm = self._seen.tolist()
        # A finite norm has finite elements. An infinite one may be a sum that FP32 could not hold.
        if not math.isfinite(norm) and not grad_bad:
            grad_bad = self._check(tensors, self._one)
        loss_bad = not math.isfinite(loss_value)
        bad = grad_bad or loss_bad
        most = config.max_grad_norm
        if most is not None and not norm + 2e-6 < 0.999 * most:  # else the factor is 1 for certain
            kernels.multiply(tensors, clip_factor(grad_norm, most))
        host_syncs = int(config.enabled and (update.reads_host() or schedule.on_host))
        if not config.enabled:
            update.apply_always()
            schedule.advance()
        elif bad:
            buffers.restore()
        else:
            update.apply_good()
            schedule.advance()
        policy.publish_weights()
        underflow = False
        if policy.compute_dtype is torch.float16 and not bad:
            self._found.copy_(
                underflows(scale.scale, grad_norm, gradients.rounding, config.underflow_threshold)
            )
            underflow = self._seen[0] > 0
        exhausted = scale.update_seen(
            grad_bad=grad_bad, loss_bad=loss_bad, underflow=underflow, grad_norm=norm
        )
        head = (loss_value, norm, used, scale.value, float(grad_bad), float(exhausted))
        ring.put(head, norms)
        return Ended(head, config.enabled and bad, host_syncs)

    def _check(self, tensors: list[Tensor], factor: Tensor) -> bool:
        self._found.zero_()
        self._parts.kernels.check_and_unscale(tensors, self._found, factor)
        return bool(self._seen[0] > 0)


def may_overflow_unscaling(config: MixedPrecisionConfig, stretch: float) -> bool:
    """Whether gradients that were finite before unscaling may not be so after it."""
    return config.min_scale < 1.0 or stretch > 1


def underflows(scale: Tensor, grad_norm: Tensor, rounding: float, threshold: float) -> Tensor:
    """Whether the underflow estimate is above the threshold (bool, 0-d); see `record.rounding_of`."""
    return rounding / (scale * grad_norm) > threshold
