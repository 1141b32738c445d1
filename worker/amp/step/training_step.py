"""One optimizer step: forward, backward, and its end.

The order of a step lives here and nowhere else. What is cast is the policy's, how a step ends is `ending`'s,
how the scale moves is `scaling`'s, and what is concluded from finished steps is `ledger`'s and
`supervision`'s.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.service.contract.precision import ComputeDtype, MixedPrecisionConfig
from halfstep.worker.amp.batches import samples_in, shapes_of, to_device
from halfstep.worker.amp.diagnosis.repetition import IncidentProbe
from halfstep.worker.amp.errors import SetupError, StepError
from halfstep.worker.amp.faster.capture import CaptureMode, StepCapture, capture_of
from halfstep.worker.amp.kernels import kernels
from halfstep.worker.amp.layers import ParameterOrder
from halfstep.worker.amp.policies import PrecisionPolicy
from halfstep.worker.amp.record.memory import MemoryMonitor, MemorySample
from halfstep.worker.amp.record.ring import HEAD, StepRing
from halfstep.worker.amp.record.rows import Attribution, FinishedStep
from halfstep.worker.amp.record.step_clock import StepClock
from halfstep.worker.amp.record.step_record import HostPart, StepRecord, Terms
from halfstep.worker.amp.step.ending import DeviceEnding, Ended, Ending, HostEnding, Parts
from halfstep.worker.amp.step.gradients import Gradients, Present
from halfstep.worker.amp.step.result import EndedRow, StepResult
from halfstep.worker.amp.step.under_way import Group
from halfstep.worker.amp.update.guarded_update import GuardedUpdate, parameters_of
from halfstep.worker.amp.update.learning_rates import Schedule
from halfstep.worker.amp.update.loss_scale import LossScale
from halfstep.worker.amp.update.snapshots import BufferGuard, RandomStates


def host_sees(device: torch.device) -> bool:
    """Whether the device's memory is the host's own, so that the host may look without waiting."""
    return device.type == "cpu"


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
        forward: Callable[[Any], Any],
        capture: CaptureMode,
        tell_uncaptured: Callable[[str], None],
    ) -> None:
        self._config = config
        self._policy = policy
        self._forward = forward
        self._criterion = criterion
        self._schedule = schedule
        self._memory = memory
        self._device = device
        policy.attach(model, optimizer)
        parameters = list(dict.fromkeys(parameters_of(optimizer)))
        if any(parameter.device != device for parameter in parameters):
            raise SetupError(
                f"optimizer: not all of its parameters are on {device}; move the model there first"
            )
        functions, on_host = kernels(device.type), host_sees(device)
        self._gradients = Gradients(parameters)
        self._update = GuardedUpdate(optimizer, functions)
        if self._update.on_device and config.enabled:
            schedule.look_ahead(device, on_host=on_host)
        self._buffers = BufferGuard(model, functions)
        self._probe = IncidentProbe(
            model, criterion, policy, parameters, buffers=self._buffers, device=device, waits=not on_host
        )
        ring = StepRing(device, norms=len(parameters))
        order = ParameterOrder(model, parameters, policy.optimized)
        self._record = StepRecord(ring, order=order, schedule=schedule)
        self._clock = StepClock(device, enabled=config.performance_monitoring)
        self.loss_scale = LossScale(config, device, active=policy.scales)
        parts = Parts(config, functions, self.loss_scale, self._update, schedule, self._buffers, policy, ring)
        self._ending: Ending = HostEnding(parts) if on_host else DeviceEnding(parts, device)
        self._terms = self._terms_now()
        self._capture: StepCapture[tuple[Group, Ended]] | None = capture_of(
            capture,
            model=model,
            optimizer=optimizer,
            device=device,
            update=self._update,
            schedule=schedule,
            recomputes=config.activation_checkpointing,
            tell=tell_uncaptured,
        )
        self._group: Group | None = None
        self.steps = 0

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
        self._group = Group(size=size)

    def whole(self, micro_batches: Sequence[tuple[Any, Any]]) -> StepResult:
        """One step over these micro-batches."""
        self.begin(len(micro_batches))
        group = cast("Group", self._group)
        try:
            self._open(group)
            ended = self._captured_or_not(group, micro_batches)
            row = self._close(group, ended)
        except BaseException:
            self._abandon(group)
            raise
        return self._result(group, micro_batches[-1][1], row)

    def micro_batch(self, data_batch: Any, target_batch: Any, *, default_size: int) -> StepResult:
        """Run one micro-batch of a step; the last one ends it."""
        if self._group is None:
            self.begin(default_size)
        group = cast("Group", self._group)
        try:
            if group.seen == 0:
                self._open(group)
                self._prepare(group)
                if self._capture is not None:
                    self._capture.give_up(
                        "micro-batches come one by one, and a graph holds a whole step; give them to "
                        "train_group together"
                    )
            self._forward_backward(group, data_batch, target_batch)
            row = self._close(group, self._conclude(group)) if group.seen == group.size else None
        except BaseException:
            self._abandon(group)
            raise
        return self._result(group, target_batch, row)

    def finish_accumulation(self) -> bool:
        """End a step that has fewer micro-batches than announced; False where none is under way."""
        group = self._group
        if group is None or group.seen == 0:
            self._group = None
            return False
        try:
            self._close(group, self._conclude(group))
        except BaseException:
            self._abandon(group)
            raise
        return True

    def device_work(self, group: Group, micro_batches: Sequence[tuple[Any, Any]]) -> Ended:
        """Everything that one whole step does on the device, from the old weights to the row in the ring.

        Over batches that are on the device and unless `needs_host`, the same tensors go through the same
        operations every time, and the host reads nothing: what a graph can hold. `_open` before it and
        `_close` after it are the host's own bookkeeping.
        """
        self._prepare(group)
        for data_batch, target_batch in micro_batches:
            self._forward_backward(group, data_batch, target_batch)
        return self._conclude(group)

    def needs_host(self) -> bool:
        """The coming step cannot end without the host: it is watched, or optimizer or scheduler ask."""
        return self._probe.must_wait(self.steps) or self._update.reads_host() or self._schedule.on_host

    def watch_closely(self) -> None:
        """An incident was read: on a GPU, find out at once about the next ones, to repeat the first."""
        self._probe.watch_closely(self.steps)

    def pause_clock(self) -> None:
        """What follows, until the next micro-batch, is not training time."""
        self._clock.pause()

    def performance(self) -> dict[str, Any]:
        """Rates over the last 1000 steps that were read."""
        return self._clock.metrics()

    def memory(self) -> MemorySample:
        """Memory as of now."""
        return self._memory.sample()

    def read(self) -> list[FinishedStep]:
        """Every finished step not yet read, in order."""
        return self._record.read(self._clock.read, self._terms)

    def precision_changed(self) -> bool:
        """The policy has changed and every step was read.

        Scales anew where scaling begins, stops where it ends; tells whether either is so.
        """
        changed = self._policy.scales != self.loss_scale.active
        if changed:
            self.loss_scale.switch(active=self._policy.scales)
        if self._capture is not None:
            self._capture.drop()
        self._terms = self._terms_now()
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
        self._clock.forget()
        self.loss_scale.load_state_dict(state["loss_scale"])
        if self._capture is not None:
            self._capture.drop()
        self._terms = self._terms_now()

    def _open(self, group: Group) -> None:
        self._clock.start()
        group.learning_rate = self._schedule.rate_used()
        if self._config.enabled and self._probe.watches(self.steps):
            group.random_states = RandomStates(self._device)

    def _captured_or_not(self, group: Group, micro_batches: Sequence[tuple[Any, Any]]) -> Ended:
        """`device_work`, as a graph where that can be."""
        capture = self._capture
        if capture is None or self.needs_host():
            return self.device_work(group, micro_batches)
        left = capture.replay(micro_batches, self._recorded)
        if left is None:
            return capture.rehearse(lambda: self.device_work(group, micro_batches))
        recorded, ended = left
        # The next replay writes to the same memory: what the caller may read later is copied.
        row = cast("Tensor", ended.row).clone()
        group.take(recorded, row[HEAD.index("loss")] if group.size == 1 else None)
        if not self._config.memory_efficiency:
            self._gradients.show(cast("Present", recorded.gradients))
        return ended._replace(row=row)

    def _recorded(self, micro_batches: Sequence[tuple[Any, Any]]) -> tuple[Group, Ended]:
        """A step for a graph: nothing of it has run, and where it fails no name may say otherwise."""
        group = Group(size=len(micro_batches))
        try:
            return group, self.device_work(group, micro_batches)
        except BaseException:
            self._buffers.forget_replaced()
            self._gradients.release()
            self._policy.release_gradients()
            raise

    def _prepare(self, group: Group) -> None:
        self._gradients.release()
        self._policy.release_gradients()
        if self._config.enabled:
            self._buffers.snapshot()
            group.prepared = True

    def _forward_backward(self, group: Group, data_batch: Any, target_batch: Any) -> None:
        policy = self._policy
        data = to_device(data_batch, self._device)
        target = to_device(target_batch, self._device)
        policy.saw_input(data)
        with policy.region():
            output = self._forward(policy.cast_input(data))
            loss = _scalar(self._criterion(policy.cast_output(output), target))
        detached = loss.detach()
        group.last_loss, group.output_shape = detached, shapes_of(output)
        group.loss_sum = detached if group.loss_sum is None else group.loss_sum + detached
        group.samples += samples_in(data)
        if group.random_states is not None:
            group.micro_batches.append((data, target))
        share = loss / group.size if group.size > 1 else loss
        scaled = share * self.loss_scale.scale if self.loss_scale.active else share
        scaled.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        policy.collect_gradients()
        group.seen += 1

    @torch.no_grad()
    def _conclude(self, group: Group) -> Ended:
        group.gradients = self._gradients.collect()
        loss = cast("Tensor", group.loss_sum)
        ended = self._ending.conclude(
            group.gradients,
            (loss / group.seen if group.seen > 1 else loss).float(),
            # A streamed step that ended early: each backward pass was divided by the announced size.
            stretch=group.size / group.seen,
            wait=self._probe.must_wait(self.steps),
        )
        group.prepared = False  # what fails from here on undoes nothing of it
        return ended

    def _close(self, group: Group, ended: Ended) -> EndedRow:
        present = cast("Present", group.gradients)
        group.gradients = None
        rounding = present.rounding if self._terms.compute_dtype == "float16" else 0.0
        if self._config.memory_efficiency:
            self._gradients.release()
            self._policy.release_gradients()
        self._clock.finish(samples=group.samples, host_syncs=ended.host_syncs)
        row = EndedRow(ended.row, rounding, self._terms)
        attribution = self._look_into(group, row) if ended.skipped else None
        self._group = None
        self.steps += 1
        self._record.add(
            HostPart(
                group.learning_rate,
                self._memory.recent(),
                group.seen,
                present.parameters,
                rounding,
                attribution,
            )
        )
        return row

    def _result(self, group: Group, target_batch: Any, row: EndedRow | None) -> StepResult:
        scale = self.loss_scale
        return StepResult(
            loss=cast("Tensor", group.last_loss),
            scale=scale.scale.clone() if row is None and scale.active else 1.0,
            ended=row,
            memory_usage=self._memory.recent().usage,
            output_shape=group.output_shape,
            target_shape=shapes_of(target_batch),
            device=self._device,
        )

    def _look_into(self, group: Group, row: EndedRow) -> Attribution | None:
        found = self._probe.look_into(
            self.steps, micro_batches=group.micro_batches, random_states=group.random_states, scale=row.scale
        )
        self._clock.pause()
        return found

    def _abandon(self, group: Group) -> None:
        # Until its update is made, an exception ends this step as if it had not begun: a retry sees the same
        # buffers and gradients.
        self._group = None
        self._gradients.release()
        self._policy.release_gradients()
        if group.prepared:
            self._buffers.restore()

    def _terms_now(self) -> Terms:
        return Terms(
            enabled=self._config.enabled,
            scales=self.loss_scale.active,
            compute_dtype=cast("ComputeDtype", str(self._policy.compute_dtype).removeprefix("torch.")),
            min_scale=self.loss_scale.least,
            underflow_threshold=self._config.underflow_threshold,
        )


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise StepError(
            f"criterion: it must return one number, not {shape}; use a reduction of 'mean' or 'sum'"
        )
    loss = loss.reshape(()) if loss.dim() else loss
    # An FP16 loss of one dimension times the scale would stay FP16 and become infinite.
    return loss.float() if loss.dtype is torch.float16 or loss.dtype is torch.bfloat16 else loss
