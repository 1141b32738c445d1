"""Training loops over the steps of `manager`: a step, an epoch, a run.

The engine draws nothing from the global random number generators; what a loader draws is its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.errors import StepError
from halfstep.worker.amp.faster.capture import CaptureMode
from halfstep.worker.amp.faster.compiling import CompileMode
from halfstep.worker.amp.manager import MixedPrecisionManager
from halfstep.worker.amp.record.rows import EngineEvent, FinishedStep, StepRow
from halfstep.worker.amp.step.result import StepResult
from halfstep.worker.amp.update.learning_rates import Interval

MicroBatch = tuple[Any, Any]


class MixedPrecisionTrainer:
    """Trains a model in mixed precision as a configuration describes.

    Attributes:
        config: the configuration.
        mixed_precision_manager: runs the steps and keeps the run's state.
        logger: a standard logger.
        model, optimizer, criterion, scheduler, device: as passed to `setup_training`; None before it.
        current_epoch: epochs finished.
        training_history: what `train_epoch` returned for each of them in `train`.
    """

    def __init__(self, config: MixedPrecisionConfig) -> None:
        self.config = config
        self.mixed_precision_manager = MixedPrecisionManager(config)
        self.logger = self.mixed_precision_manager.logger
        self.model: nn.Module | None = None
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self.criterion: Callable[[Any, Any], Tensor] | None = None
        self.device: torch.device | None = None
        self.current_epoch = 0
        self.training_history: list[dict[str, Any]] = []
        self._epoch_steps: list[FinishedStep] = []

    def setup_training(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        scheduler: Any = None,
        *,
        device: torch.device | str | None = None,
        scheduler_interval: Interval = "epoch",
        gradient_accumulation_steps: int = 1,
        capture: CaptureMode = "off",
        compile: CompileMode = "off",  # noqa: A002 - the setting's name everywhere
    ) -> None:
        """Prepare a model for training.

        Args:
            model: its parameters are on one device, or are moved to `device`.
            optimizer: used as it was passed; fused Adam, AdamW, Adagrad and SGD need no host read in a step.
            criterion: (output, target) -> one number.
            scheduler: a torch learning-rate scheduler of `optimizer`.
            device: where to train; default: where the model's parameters are.
            scheduler_interval: "step": on every applied step; "epoch": at an epoch's end if one was applied.
            gradient_accumulation_steps: micro-batches in a full step.
            capture: "auto": on a GPU, whole steps are recorded as a CUDA graph and replayed while batches
                keep their shape, which pays where starting operations takes longer than running them. The
                forward pass must do the same operations in every step. Where steps cannot be captured they
                run as with "off", and `on_event` says why.
            compile: how torch.compile prepares the model for training steps: "default", "max-autotune", or
                "off". Evaluation runs the model itself, and the state dict has the model's own names. A
                model that cannot be compiled trains uncompiled, and `on_event` says why.

        Raises:
            SetupError: the parts do not fit each other or the configuration.
            UnsupportedPrecisionError: the device lacks the precision asked for.
        """
        self.mixed_precision_manager.setup(
            model,
            optimizer,
            criterion,
            scheduler,
            device=device,
            scheduler_interval=scheduler_interval,
            gradient_accumulation_steps=gradient_accumulation_steps,
            capture=capture,
            compile=compile,
        )
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.scheduler = scheduler
        self.device = self.mixed_precision_manager.device
        self.current_epoch = 0
        self.training_history = []

    @property
    def on_step(self) -> Callable[[Sequence[StepRow]], None] | None:
        """Called with the rows of finished steps, in order, every 32 steps and at `flush`."""
        return self.mixed_precision_manager.ledger.on_step

    @on_step.setter
    def on_step(self, listener: Callable[[Sequence[StepRow]], None] | None) -> None:
        self.mixed_precision_manager.ledger.on_step = listener

    @property
    def on_event(self) -> Callable[[EngineEvent], None] | None:
        """Called with what happens to the run's precision; set it before `setup_training` to miss nothing."""
        return self.mixed_precision_manager.ledger.on_event

    @on_event.setter
    def on_event(self, listener: Callable[[EngineEvent], None] | None) -> None:
        self.mixed_precision_manager.ledger.on_event = listener

    @property
    def current_step(self) -> int:
        """Optimizer steps attempted so far, skipped ones included."""
        return self.mixed_precision_manager.current_step

    def train(self, train_loader: Iterable[MicroBatch], num_epochs: int) -> list[dict[str, Any]]:
        """Train for `num_epochs` passes over the loader; returns `training_history`."""
        for _ in range(num_epochs):
            self.training_history.append(self.train_epoch(train_loader))
        return self.training_history

    def train_epoch(self, train_loader: Iterable[MicroBatch]) -> dict[str, Any]:
        """One pass over the loader of (input, target) batches; a last short step holds what is left.

        Returns:
            epoch_loss (mean over micro-batches), num_batches (micro-batches), overflow_steps,
            underflow_steps, nan_steps (optimizer steps), average_scale.

        Raises:
            ValueError: the loader is empty.
            NonFiniteError: non-finite values that may not, or can no longer, be skipped.
        """
        if self.model is None:
            raise StepError("call setup_training(model, optimizer, criterion) first")
        manager = self.mixed_precision_manager
        self.flush()
        self.model.train()
        totals = EpochTotals()
        manager.ledger.on_finished = totals.add
        try:
            for group in _groups(train_loader, manager.accumulation):
                self.train_group(group)
            self.flush()
        finally:
            manager.ledger.on_finished = None
        if totals.steps == 0:
            raise ValueError("train_loader: it gave no batch")
        summary = totals.summary()
        self.end_epoch(metric=summary["epoch_loss"])
        return summary

    def train_group(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step over these (input, target) micro-batches, each weighing the same."""
        return self.mixed_precision_manager.train_group(micro_batches)

    def train_step(self, data_batch: Any, target_batch: Any) -> StepResult:
        """Train on one micro-batch; the last one of its group makes the optimizer step.

        Args:
            data_batch: input of the model: a tensor, or nested dicts and tuples of tensors.
            target_batch: target of the criterion, likewise.

        Returns:
            A mapping that reads the device only when a key is asked for: loss (this micro-batch's),
            current_scale (used in this step), overflow_detected, underflow_detected, nan_detected (this
            step's; false until it ends), memory_usage, output_shape, target_shape, device, is_step.
        """
        return self.mixed_precision_manager.train_step(data_batch, target_batch)

    def begin_group(self, size: int) -> None:
        """Announce that the next step has `size` micro-batches instead of gradient_accumulation_steps."""
        self.mixed_precision_manager.begin_group(size)

    def finish_accumulation(self) -> bool:
        """End a step that has fewer micro-batches than announced; False where none is under way."""
        return self.mixed_precision_manager.finish_accumulation()

    def end_epoch(self, metric: float | None = None) -> None:
        """Count an epoch; step an epoch scheduler if a step of it was applied.

        Args:
            metric: what a metric-driven scheduler (ReduceLROnPlateau) follows; without it such a one stays.
        """
        self.finish_accumulation()
        self.mixed_precision_manager.end_epoch(metric)
        self.current_epoch += 1

    def flush(self) -> None:
        """Deliver every finished step to `on_step`."""
        self.mixed_precision_manager.flush()

    def check(self) -> None:
        """Raise what must end the run; it asks by itself every 32 steps and at an epoch's end."""
        self.mixed_precision_manager.check()

    def replay_decisions(self, decisions: Sequence[dict[str, Any]]) -> None:
        """Make a resumed run decide by memory as it did before, where it would measure again.

        Args:
            decisions: the `data` of every "precision" event that the run has told, in order; call it after
                `load_state_dict`. What lies before the saved step is ignored.
        """
        self.mixed_precision_manager.replay_decisions(decisions)

    def evaluation_region(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Evaluate between two steps without touching training.

        Inside: eval mode, no gradients, the casts of the current step, no scaling; gives a function from an
        input batch to the model's output. On leaving, train mode and the random number generators are as
        they were.
        """
        return self.mixed_precision_manager.evaluation_region()

    def get_mixed_precision_stats(self) -> dict[str, Any]:
        """The run so far.

        Keys: current_step, current_scale (the next step's), overflow_count, underflow_count, nan_count,
        skipped_steps, average_scale, memory_usage (0..1), last_overflow, performance_metrics.
        """
        return self.mixed_precision_manager.get_mixed_precision_stats()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, between two steps: tensors and primitives.

        The weights are under "model". Random number generators and the position in the data are the caller's.
        """
        return {**self.mixed_precision_manager.state_dict(), "current_epoch": self.current_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take back what `state_dict` gave; returns how the saved configuration differs from this one."""
        differences = self.mixed_precision_manager.load_state_dict(state)
        self.current_epoch = int(state["current_epoch"])
        return differences

    def save_mixed_precision_state(self, filepath: str | PathLike[str]) -> None:
        """Save the engine's state (not the weights) to a file that loads with `weights_only=True`."""
        self.mixed_precision_manager.save_mixed_precision_state(filepath)

    def load_mixed_precision_state(self, filepath: str | PathLike[str]) -> list[str]:
        """Load what `save_mixed_precision_state` saved; returns how its configuration differs."""
        return self.mixed_precision_manager.load_mixed_precision_state(filepath)


class EpochTotals:
    """Sums over the steps of one epoch."""

    def __init__(self) -> None:
        self.steps = 0
        self._batches = 0
        self._loss = 0.0
        self._scale = 0.0
        self._overflows = 0
        self._underflows = 0
        self._nans = 0

    def add(self, done: FinishedStep) -> None:
        """Take one finished step into account."""
        self.steps += 1
        self._batches += done.micro_batches
        self._loss += done.row.loss * done.micro_batches
        self._scale += done.row.scale
        self._overflows += done.row.overflow
        self._underflows += done.row.underflow
        self._nans += done.row.nan

    def summary(self) -> dict[str, Any]:
        """What `train_epoch` returns."""
        return {
            "epoch_loss": self._loss / self._batches,
            "num_batches": self._batches,
            "overflow_steps": self._overflows,
            "underflow_steps": self._underflows,
            "nan_steps": self._nans,
            "average_scale": self._scale / self.steps,
        }


def _groups(loader: Iterable[MicroBatch], size: int) -> Iterator[list[MicroBatch]]:
    # Looks ahead, since every backward pass is divided by the size that its group turns out to have.
    group: list[MicroBatch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
