"""Whole steps as a graph: recorded once, replayed while nothing changes that a recording has frozen.

Here is decided when to record, whether a recording fits the coming step, and what happens where none can be
made. What a step does is `step`'s. The device's own graphs are in `graphs`; a recording that runs on no GPU
can stand in for them.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.worker.amp.batches import map_tensors, tensors_of
from halfstep.worker.amp.errors import SetupError
from halfstep.worker.amp.faster.cuda_graphs import graphs_for
from halfstep.worker.amp.update.guarded_update import GuardedUpdate, parameters_of
from halfstep.worker.amp.update.learning_rates import Schedule

CaptureMode = Literal["off", "auto"]
MicroBatches = Sequence[tuple[Any, Any]]
T = TypeVar("T")
R = TypeVar("R")

REHEARSALS = 3
"""Steps of one kind that run before one is recorded: what is built at first use must not be recorded."""

MOST_KINDS = 8
"""Kinds of batches after which none is expected to come often."""

WORTHWHILE_REPLAYS = 64
"""A recording that is not replayed so often was not worth its making."""

_MOST_SHORT_LIVED = 4
_MOST_MICRO_BATCHES = 64

logger = logging.getLogger(__name__)


class Graphs(Protocol):
    """What a device can do with work that runs the same operations on the same memory each time."""

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str | None]:
        """Run the work where it would be recorded. Also says what in it cannot be, if anything."""

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record the work without running it.

        Returns:
            What runs it, and what it returned: tensors that each run writes anew.

        Raises:
            Exception: it cannot be recorded; nothing has run.
        """


@dataclass(slots=True)
class _Recording(Generic[T]):
    """A recorded step.

    Attributes:
        kind: of its micro-batches.
        frozen: what else it has frozen.
        inputs: the tensors it reads its micro-batches from.
        run: runs it.
        left: what the work returned.
        replays: how often it was run.
    """

    kind: Any
    frozen: Any
    inputs: list[Tensor]
    run: Callable[[], None]
    left: T
    replays: int = 0


def capture_of(
    mode: CaptureMode,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    update: GuardedUpdate,
    schedule: Schedule,
    recomputes: bool,
    device: torch.device,
    tell: Callable[[str], None],
) -> "StepCapture[Any] | None":
    """What replays the steps of `model`; None where none will be.

    Args:
        mode: as `setup_training` takes it.
        model: what is trained.
        optimizer: what trains it.
        update: how a step uses the optimizer.
        schedule: where a step's learning rates come from.
        recomputes: activations are recomputed in the backward pass.
        device: where the step runs.
        tell: takes the sentence that says why steps are not captured.
    """
    if mode == "off":
        return None
    if mode != "auto":
        raise SetupError(f"capture: 'auto' or 'off', not {mode!r}")
    graphs = graphs_for(device)
    reason = None
    if graphs is None:
        reason = f"that takes a CUDA device, and this run trains on {device}; set capture to 'off'"
    elif not update.on_device:
        reason = (
            f"{type(optimizer).__name__} as it was made asks the host in every step; use Adam, AdamW or "
            "SGD with fused=True"
        )
    elif schedule.on_host:
        reason = (
            "the scheduler asks the host in every step; let it move once an epoch, or use one that changes "
            "learning rates alone"
        )
    elif recomputes:
        reason = (
            "activation_checkpointing sets random number generators from the host; switch one of the two off"
        )
    if graphs is None or reason is not None:
        tell(unavailable(str(reason)))
        return None
    return StepCapture(graphs, model=model, optimizer=optimizer, device=device, tell=tell)


class StepCapture(Generic[T]):
    """Replays the steps of one model and optimizer where it can; says once, in a sentence, where it cannot.

    In each step that does not need the host: `replay`, and where that gives None, `rehearse`.
    """

    def __init__(
        self,
        graphs: Graphs,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        self._graphs = graphs
        self._optimizer = optimizer
        self._device = device
        self._tell = tell
        self._modules = list(model.modules())
        self._parameters = list(dict.fromkeys((*model.parameters(), *parameters_of(optimizer))))
        self._recording: _Recording[T] | None = None
        self._rehearsed: dict[Any, int] = {}
        self._coming: Any = None
        self._missed = 0
        self._short_lived = 0
        self._given_up = False

    def replay(self, micro_batches: MicroBatches, work: Callable[[MicroBatches], T]) -> T | None:
        """Run the coming step from a recording, made now if it is time.

        Args:
            micro_batches: (input, target) of the step.
            work: all that the step does on the device, for the recording. Where it raises, or the device
                refuses, it must not have changed anything on the host.

        Returns:
            What `work` left when it was recorded, its tensors now holding this step's values until the next
            one; None where the step did not run.
        """
        if self._given_up:
            return None
        try:
            self._coming = _kind(micro_batches)
        except _Unfit as unfit:
            self.give_up(str(unfit))
            return None
        recording = self._fitting()
        if recording is not None:
            for static, tensor in zip(recording.inputs, tensors_of(micro_batches), strict=True):
                static.copy_(tensor, non_blocking=True)
        elif self._recording is None and self._rehearsed.get(self._coming, 0) >= REHEARSALS:
            recording = self._record(micro_batches, work)
        if recording is None:
            return None
        recording.run()
        recording.replays += 1
        return recording.left

    def rehearse(self, work: Callable[[], R]) -> R:
        """Run a step that `replay` did not."""
        if self._given_up or self._recording is not None:
            return work()
        drawn, buffers = _host_randomness(), self._buffers()
        result, unfit = self._graphs.rehearse(work)
        if unfit is None and drawn != _host_randomness():
            unfit = (
                "the model draws from Python's or NumPy's random numbers, which a graph would freeze; draw "
                "with torch on the device"
            )
        if unfit is None and any(now is not then for now, then in zip(self._buffers(), buffers, strict=True)):
            unfit = (
                "a layer puts a new tensor in a buffer's place in every step; write into the buffer instead"
            )
        if unfit is not None:
            self.give_up(unfit)
            return result
        self._rehearsed[self._coming] = self._rehearsed.get(self._coming, 0) + 1
        if len(self._rehearsed) > MOST_KINDS:
            self.give_up(
                f"batches have come in {len(self._rehearsed)} shapes and a graph holds one; pad or drop "
                "what is short"
            )
        return result

    def drop(self) -> None:
        """The next steps are other ones than those recorded, for a reason that is no fault."""
        self._recording = None
        self._rehearsed.clear()

    def give_up(self, reason: str) -> None:
        """Record nothing from now on, and say why: a clause, and what to try next."""
        if self._given_up:
            return
        self.drop()
        self._given_up = True
        self._tell(unavailable(reason))

    def _fitting(self) -> _Recording[T] | None:
        """The recording, where it does what the coming step would do."""
        recording = self._recording
        if recording is None:
            return None
        if recording.frozen != self._frozen():
            self._retire(
                recording,
                "settings of the optimizer or the model's modes change too often, and a graph freezes "
                "them; keep them for longer",
            )
            return None
        if recording.kind == self._coming:
            return recording
        self._missed += 1
        if self._missed > recording.replays + WORTHWHILE_REPLAYS:
            self._retire(
                recording, "most batches have another shape than the ones before; pad or drop what is short"
            )
        return None

    def _retire(self, recording: _Recording[T], why: str) -> None:
        self._short_lived = self._short_lived + 1 if recording.replays < WORTHWHILE_REPLAYS else 0
        self.drop()
        if self._short_lived >= _MOST_SHORT_LIVED:
            self.give_up(why)

    def _record(self, micro_batches: MicroBatches, work: Callable[[MicroBatches], T]) -> _Recording[T] | None:
        statics = map_tensors(
            micro_batches, lambda tensor: torch.empty_like(tensor, device=self._device).copy_(tensor)
        )
        frozen = self._frozen()
        try:
            with _capturable(self._optimizer):
                run, left = self._graphs.record(lambda: work(statics))
        except Exception as error:  # noqa: BLE001 - whatever a model does that a graph cannot hold
            self.give_up(
                f"the step could not be recorded ({type(error).__name__}: {_first_line(error)}); keep the "
                "model's work on the device and free of decisions by the host"
            )
            return None
        logger.info("steps are replayed as a graph from here on")
        self._missed = 0
        self._recording = _Recording(self._coming, frozen, list(tensors_of(statics)), run, left)
        return self._recording

    def _frozen(self) -> Any:
        """What a recording holds as it was, besides its micro-batches, in a form that can be compared.

        By place and not by value where it is on the device: asking for a value would wait for it.
        """
        optimizer = self._optimizer
        return (
            id(optimizer.state),
            [
                [(name, _constant(value)) for name, value in group.items() if name != "params"]
                for group in optimizer.param_groups
            ],
            [module.training for module in self._modules],
            [(parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters],
            [id(buffer) for buffer in self._buffers()],
        )

    def _buffers(self) -> list[Tensor | None]:
        return [buffer for module in self._modules for buffer in vars(module)["_buffers"].values()]


def unavailable(reason: str) -> str:
    """The sentence that says why steps are not captured."""
    return f"capture: steps run operation by operation, not as one graph: {reason}"


class _Unfit(Exception):
    """Why batches cannot be held by a graph."""


def _kind(batch: Any) -> Any:
    """What a recording freezes of a batch: everything but the numbers in its tensors. Hashable."""
    if isinstance(batch, Tensor):
        return batch.shape, batch.stride(), batch.dtype
    if isinstance(batch, Mapping):
        return type(batch), tuple((name, _kind(value)) for name, value in batch.items())
    if isinstance(batch, (list, tuple)):
        if len(batch) > _MOST_MICRO_BATCHES:
            raise _Unfit(
                f"a step of {len(batch)} parts is too long for a graph; accumulate at most "
                f"{_MOST_MICRO_BATCHES}"
            )
        return type(batch), tuple(_kind(value) for value in batch)
    if batch is None or isinstance(batch, (bool, int, float, str, bytes)):
        return type(batch), batch
    raise _Unfit(
        f"a batch holds a {type(batch).__name__}, which a graph cannot follow from step to step; make it a "
        "tensor"
    )


def _constant(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _host_randomness() -> Any:
    _, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), tuple(rest)


@contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[None]:
    """Torch's optimizers refuse to be recorded unless told so; fused ones run the same kernels either way."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
