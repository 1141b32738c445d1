"""One optimizer step: forward, backward, check, clip, guarded update, scale, record.

The order of a step lives here and nowhere else; the host reads the device only where it has to. What is cast
is the policy's, how the scale moves is `scaling`'s, and what is concluded from finished steps is `manager`'s
and `supervision`'s.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from service.contract.precision import MixedPrecisionConfig
from worker.amp.batches import samples_in, shapes_of, to_device
from worker.amp.errors import SetupError, StepError
from worker.amp.guard import BufferGuard, RandomStates
from worker.amp.incidents import IncidentProbe
from worker.amp.layers import ParameterOrder
from worker.amp.memory import MemoryMonitor, MemorySample
from worker.amp.optimizers import GuardedUpdate, parameters_of
from worker.amp.performance import StepClock
from worker.amp.policies import PrecisionPolicy
from worker.amp.private import kernels
from worker.amp.record import HostPart, StepRecord
from worker.amp.scaling import LossScale
from worker.amp.schedule import Schedule
from worker.amp.telemetry import (
    Attribution,
    ComputeDtype,
    DeviceFigures,
    DeviceFlags,
    FinishedStep,
    StepResult,
)


@dataclass(slots=True)
class _Group:
    """The micro-batches of the step that is under way."""

    size: int
    seen: int = 0
    samples: int = 0
    loss_sum: Tensor | None = None
    micro_batches: list[tuple[Any, Any]] = field(default_factory=list)
    random_states: RandomStates | None = None


class TrainingStep:
    """Trains one model with one optimizer, step by step.

    Attributes:
        steps: optimizer steps attempted.
        loss_scale: the scale and its counters.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig,
        policy: PrecisionPolicy,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        schedule: Schedule,
        memory: MemoryMonitor,
        device: torch.device,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._forward = model if forward is None else forward
        self._optimizer = optimizer
        self._criterion = criterion
        self._schedule = schedule
        self._device = device
        self._kernels = kernels(device.type)
        policy.attach(model, optimizer)
        self._parameters = list(dict.fromkeys(parameters_of(optimizer)))
        if any(parameter.device != device for parameter in self._parameters):
            raise SetupError(
                f"optimizer: not all of its parameters are on {device}; move the model there first"
            )
        self._order = ParameterOrder(model, self._parameters, policy.optimized)
        self._update = GuardedUpdate(optimizer, self._kernels)
        if self._update.on_device and config.enabled:
            schedule.follow_on_device(device)
        self._buffers = BufferGuard(model, self._kernels)
        self._probe = IncidentProbe(
            model, criterion, policy, self._parameters, buffers=self._buffers, device=device
        )
        self._record = StepRecord(device, order=self._order, schedule=schedule, min_scale=config.min_scale)
        self._clock = StepClock(enabled=config.performance_monitoring)
        self._memory = memory
        self.loss_scale = LossScale(config, device, active=policy.scales)
        self._group: _Group | None = None
        self.steps = 0
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._skip = torch.zeros((), dtype=torch.float32, device=device)
        # On a CPU the host sees the device's memory: no read to wait for, and none to count.
        self._skip_seen = self._skip.numpy() if device.type == "cpu" else None
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)
        self._false = torch.zeros((), dtype=torch.bool, device=device)
        self._may_overflow_unscaling = config.min_scale < 1.0 or config.initial_scale < 1.0

    @property
    def announced(self) -> bool:
        """The coming step's size is known."""
        return self._group is not None

    @property
    def in_group(self) -> bool:
        """A step is under way: some of its micro-batches were seen."""
        return self._group is not None and self._group.seen > 0

    def begin(self, size: int) -> None:
        """Announce a step of `size` micro-batches."""
        if self.in_group:
            raise StepError(
                "a step is under way; finish its micro-batches or call finish_accumulation() first"
            )
        if size < 1:
            raise StepError(f"a step has at least one micro-batch, not {size}")
        self._group = _Group(size=size)

    def micro_batch(self, data_batch: Any, target_batch: Any, *, default_size: int) -> StepResult:
        """Run one micro-batch; the last one of its step ends the step."""
        if self._group is None:
            self.begin(default_size)
        group = cast("_Group", self._group)
        try:
            if group.seen == 0:
                self._clock.start()
                self._release_gradients()
                if self._config.enabled:
                    self._buffers.snapshot()
                    if self._probe.watches(self.steps):
                        group.random_states = RandomStates(self._device)
            loss, output = self._forward_backward(group, data_batch, target_batch)
            scale = self.loss_scale.scale
            flag_row = None
            if group.seen == group.size:
                figure_row, flag_row = self._finish(group)
                scale = figure_row[1]
            elif self.loss_scale.active:
                scale = scale.clone()
        except BaseException:
            self._abandon(group)
            raise
        return StepResult(
            loss=loss,
            scale=scale,
            flag_row=flag_row,
            memory_usage=self._memory.recent().usage,
            output_shape=shapes_of(output),
            target_shape=shapes_of(target_batch),
            device=self._device,
        )

    def finish_accumulation(self) -> bool:
        """End a step that has fewer micro-batches than announced; False where none is under way."""
        group = self._group
        if group is None or group.seen == 0:
            self._group = None
            return False
        try:
            self._finish(group)
        except BaseException:
            self._abandon(group)
            raise
        return True

    def watch_closely(self) -> None:
        """An incident was read: on a GPU, find out at once about the next ones, to repeat the first."""
        self._probe.watch_closely(self.steps)

    def pause_clock(self) -> None:
        """What follows, until the next micro-batch, is not training time."""
        self._clock.pause()

    def performance(self) -> dict[str, Any]:
        """Rates over the last 1000 steps."""
        return self._clock.metrics()

    def memory(self) -> MemorySample:
        """Memory as of now."""
        return self._memory.sample()

    def read(self) -> list[FinishedStep]:
        """Every finished step not yet read, in order."""
        return self._record.read()

    def precision_changed(self) -> bool:
        """The policy has changed: scale anew where scaling begins, stop where it ends; tells if so."""
        changed = self._policy.scales != self.loss_scale.active
        if changed:
            self.loss_scale.switch(active=self._policy.scales)
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Everything of the step that a bit-exact resume needs; call it between steps, after `read`."""
        if self.in_group:
            raise StepError(
                "a step is under way; its gradients are not part of a saved state: finish it first"
            )
        return {"steps": self.steps, "loss_scale": self.loss_scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._group = None
        self.steps = int(state["steps"])
        self._record.restart(self.steps)
        self.loss_scale.load_state_dict(state["loss_scale"])

    def _forward_backward(self, group: _Group, data_batch: Any, target_batch: Any) -> tuple[Tensor, Any]:
        data = to_device(data_batch, self._device)
        target = to_device(target_batch, self._device)
        self._policy.saw_input(shapes_of(data))
        with self._policy.region():
            output = self._forward(self._policy.cast_input(data))
            loss = _scalar(self._criterion(self._policy.cast_output(output), target))
        detached = loss.detach()
        group.loss_sum = detached if group.loss_sum is None else group.loss_sum + detached
        group.samples += samples_in(data)
        if group.random_states is not None:
            group.micro_batches.append((data, target))
        share = loss / group.size if group.size > 1 else loss
        scaled = share * self.loss_scale.scale if self.loss_scale.active else share
        scaled.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._policy.collect_gradients()
        group.seen += 1
        return detached, output

    @torch.no_grad()
    def _finish(self, group: _Group) -> tuple[Tensor, Tensor]:
        config = self._config
        gradients = self._gradients()
        loss = cast("Tensor", group.loss_sum)
        loss = (loss / group.seen if group.seen > 1 else loss).float()
        grad_bad, norms, grad_norm = self._unscale_and_measure(gradients, loss, group)
        loss_bad = (loss - loss) != 0  # as ~isfinite, in two operations instead of five
        found = grad_bad | loss_bad
        if config.max_grad_norm is not None:
            # By multiplication, as torch.nn.utils.clip_grad_norm_ does, so that results agree to the bit.
            self._kernels.multiply(gradients, torch.clamp(config.max_grad_norm / (grad_norm + 1e-6), max=1.0))
        learning_rate = self._schedule.rate_used()
        self._skip.copy_(found)
        host_syncs, skipped = self._apply(found)
        self._policy.publish_weights()
        figures, flags = self._outcome(loss, grad_bad, loss_bad, found, norms, grad_norm, gradients)
        rows = self._record.write(figures, flags)
        if config.memory_efficiency:
            self._release_gradients()
        step_time_ms = self._clock.finish(samples=group.samples, host_syncs=host_syncs)
        attribution = self._look_into(group, figures.scale) if skipped else None
        self._group = None
        self.steps += 1
        low_dtype = str(self._policy.compute_dtype).removeprefix("torch.")
        self._record.write_host(
            HostPart(
                learning_rate=learning_rate,
                memory=self._memory.recent(),
                step_time_ms=step_time_ms,
                compute_dtype=cast("ComputeDtype", low_dtype),
                micro_batches=group.seen,
                scaled=self.loss_scale.active or low_dtype == "float16",
                attribution=attribution,
            )
        )
        return rows

    def _gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = parameter.grad = gradient.coalesce()
                gradient = gradient.values()
            gradients.append(gradient)
        if not gradients:
            raise StepError(
                "no parameter of the optimizer received a gradient: does the loss depend on them?"
            )
        return gradients

    def _unscale_and_measure(
        self, gradients: list[Tensor], loss: Tensor, group: _Group
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a gradient is not finite; the norm of each, and the loss behind them; the norm of all."""
        inverse = self.loss_scale.inverse
        if group.seen != group.size:
            # A streamed step that ended early: each backward pass was divided by the announced size.
            inverse = inverse * (group.size / group.seen)
        found = self._found.zero_()
        self._kernels.check_and_unscale(gradients, found, inverse)
        if self._may_overflow_unscaling:
            self._kernels.check_and_unscale(gradients, found, self._one)
        norms = torch.stack([*self._kernels.norms(gradients), loss])
        return found > 0, norms, torch.linalg.vector_norm(norms[:-1])

    def _apply(self, found: Tensor) -> tuple[int, bool]:
        """Update the weights where the step was good.

        Returns:
            The host's reads of the device, and whether the host knows that the step was skipped.
        """
        if not self._config.enabled:
            self._update.apply_always()
            self._schedule.advance()
            return 0, False
        host_syncs = int(self._update.reads_host())
        applied = self._update.apply(self._skip)
        if applied is None and (self._schedule.on_host or self._probe.must_wait(self.steps)):
            applied = not bool(found.item())
            host_syncs += 1
        self._schedule.advance_where(found)
        if applied is None:
            self._buffers.restore_where(found)
            return host_syncs, self._skip_seen is not None and bool(self._skip_seen)
        if applied:
            self._schedule.advance()
        else:
            self._buffers.restore()
        return host_syncs, not applied

    def _release_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._policy.release_gradients()

    def _look_into(self, group: _Group, scale: Tensor) -> Attribution | None:
        found = self._probe.look_into(
            self.steps, micro_batches=group.micro_batches, random_states=group.random_states, scale=scale
        )
        self._clock.pause()
        return found

    def _outcome(
        self,
        loss: Tensor,
        grad_bad: Tensor,
        loss_bad: Tensor,
        found: Tensor,
        norms: Tensor,
        grad_norm: Tensor,
        gradients: Sequence[Tensor],
    ) -> tuple[DeviceFigures, DeviceFlags]:
        enabled = self._config.enabled
        used_scale = self.loss_scale.scale.clone() if self.loss_scale.active else self._one
        overflow = self.loss_scale.overflow(grad_bad, loss_bad)
        estimate, underflow = self._zero, self._false
        if self._policy.compute_dtype is torch.float16:
            # sqrt(N) * 2^-25 / (S * ||g||): the relative L2 rounding that FP16's absolute spacing of 2^-24
            # below 2^-14 puts on a gradient stored in it.
            elements = sum(gradient.numel() for gradient in gradients)
            estimate = math.sqrt(elements) * 2.0**-25 / (used_scale * grad_norm)
            underflow = (estimate > self._config.underflow_threshold) & ~found
        range_exhausted = self.loss_scale.update(
            overflow=overflow, found=found, underflow=underflow, grad_norm=grad_norm
        )
        flags = DeviceFlags(
            overflow=overflow,
            nan=found & ~overflow if self.loss_scale.active else found,
            underflow=underflow,
            skipped=found if enabled else self._false,
            has_inf=found & torch.isinf(norms).any(),
            has_nan=torch.isnan(norms).any(),
            grad_bad=grad_bad,
            range_exhausted=range_exhausted,
        )
        figures = DeviceFigures(
            loss=loss,
            scale=used_scale,
            underflow_estimate=estimate.float(),
            grad_norm=grad_norm.float(),
            next_scale=self.loss_scale.scale,
            suspect=self._order.deepest_non_finite(norms[:-1]),
        )
        return figures, flags

    def _abandon(self, group: _Group) -> None:
        # The caller's exception ends this step as if it had not begun: a retry sees the same buffers and
        # gradients.
        self._group = None
        self._release_gradients()
        if self._config.enabled and group.seen < group.size:
            self._buffers.restore()


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise StepError(
            f"criterion: it must return one number, not {shape}; use a reduction of 'mean' or 'sum'"
        )
    loss = loss.reshape(()) if loss.dim() else loss
    # An FP16 loss of one dimension times the scale would stay FP16 and become infinite.
    return loss.float() if loss.dtype in {torch.float16, torch.bfloat16} else loss
