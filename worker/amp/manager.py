"""A run in mixed precision: its configuration, its counters, its decisions, and what is saved of it.

A single step is `step`'s, loops over data are `trainer`'s.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.service.contract.precision import MixedPrecisionConfig, ResolvedPrecision, resolve
from halfstep.worker.amp.admission import check_weights, device_of
from halfstep.worker.amp.capability import capability_of
from halfstep.worker.amp.diagnosis.ledger import Ledger
from halfstep.worker.amp.diagnosis.state import MixedPrecisionState
from halfstep.worker.amp.errors import SetupError, StateMismatchError, StepError
from halfstep.worker.amp.evaluation import evaluating
from halfstep.worker.amp.faster.capture import CaptureMode
from halfstep.worker.amp.faster.compiling import CompileMode, forward_of
from halfstep.worker.amp.faster.recomputation import recompute_blocks
from halfstep.worker.amp.policies import PrecisionPolicy, Transition, build_policy
from halfstep.worker.amp.record.memory import MemoryMonitor
from halfstep.worker.amp.record.rows import EngineEvent, FinishedStep
from halfstep.worker.amp.saved_state import STATE_FORMAT, check_format, config_differences, plain
from halfstep.worker.amp.step.result import StepResult
from halfstep.worker.amp.step.training_step import TrainingStep
from halfstep.worker.amp.update.learning_rates import Interval, Schedule
from halfstep.worker.amp.update.snapshots import RandomStates

DECISION_STEPS = 32
"""After every so many steps of the run the host reads what was finished, and decides."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What `setup` is given, made complete."""

    model: nn.Module
    optimizer: Optimizer
    criterion: Callable[[Any, Any], Tensor]
    device: torch.device
    resolved: ResolvedPrecision
    policy: PrecisionPolicy
    schedule: Schedule
    step: TrainingStep
    accumulation: int


class MixedPrecisionManager:
    """Runs training steps for one model and one optimizer.

    Attributes:
        config: the configuration.
        logger: a standard logger.
        ledger: what the run has told so far, and whom it tells: at decision steps and at `flush`.
    """

    def __init__(self, config: MixedPrecisionConfig) -> None:
        self.config = config
        self.logger = logging.getLogger("halfstep.worker.amp")
        self.ledger = Ledger(config, self.logger)
        self._prepared: _Run | None = None

    def setup(
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
        """Prepare a model and its optimizer; see `MixedPrecisionTrainer.setup_training`."""
        if gradient_accumulation_steps < 1:
            raise SetupError(f"gradient_accumulation_steps: at least 1, not {gradient_accumulation_steps}")
        target = torch.device(device) if device is not None else device_of(model)
        if target == torch.device("cuda"):
            target = torch.device("cuda", torch.cuda.current_device())
        resolved = resolve(self.config, capability_of(target))
        if self._prepared is not None:
            self.flush()
            self._prepared.policy.detach()
            self._prepared = None
        model.to(target)
        if isinstance(criterion, nn.Module):
            criterion.to(target)
        notices = check_weights(model) if self.config.enabled else []
        schedule = Schedule(optimizer, scheduler, scheduler_interval)
        if self.config.activation_checkpointing and not recompute_blocks(model):
            notices.append(
                "activation_checkpointing: the model has no block of several layers, so nothing is recomputed"
            )
        memory = MemoryMonitor(target)
        policy = build_policy(self.config, resolved, target, memory)
        tell_uncompiled = partial(self._tell_unavailable, "compile_unavailable")
        forward = forward_of(model, compile, policy=policy, device=target, tell=tell_uncompiled)
        step = TrainingStep(
            self.config,
            policy,
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            schedule=schedule,
            memory=memory,
            device=target,
            forward=forward,
            capture=capture,
            tell_uncaptured=partial(self._tell_unavailable, "capture_unavailable"),
        )
        self._prepared = _Run(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            device=target,
            resolved=resolved,
            policy=policy,
            schedule=schedule,
            step=step,
            accumulation=gradient_accumulation_steps,
        )
        self.ledger.open(scale=resolved.initial_scale if policy.scales else 1.0)
        for warning in (*resolved.warnings, *policy.notices(), *notices):
            self.ledger.tell(EngineEvent(type="warning", level="warning", message=warning, step=0))

    @property
    def state(self) -> MixedPrecisionState:
        """Counters and short histories, read from the device at decision steps and at `flush`."""
        return self.ledger.state

    @property
    def resolved(self) -> ResolvedPrecision:
        """What the configuration means on this run's device."""
        return self._run.resolved

    @property
    def device(self) -> torch.device:
        """Where the model is and batches are moved to."""
        return self._run.device

    @property
    def model(self) -> nn.Module:
        """The model under training."""
        return self._run.model

    @property
    def accumulation(self) -> int:
        """Micro-batches in a full step."""
        return self._run.accumulation

    @property
    def current_step(self) -> int:
        """Optimizer steps attempted so far."""
        return self._run.step.steps

    @property
    def performance_metrics(self) -> dict[str, Any]:
        """Speed, host syncs per step and the overflow budget."""
        if self._prepared is None:
            return {}
        metrics = self._prepared.step.performance()
        if metrics:
            metrics["memory_peak_bytes"] = self._prepared.step.memory().peak
        metrics["overflow_rate"] = self.ledger.supervisor.overflow_rate
        metrics["overflow_budget_exceeded"] = self.ledger.supervisor.overflow_budget_exceeded
        return metrics

    def begin_group(self, size: int) -> None:
        """Announce that the next step has `size` micro-batches."""
        self._run.step.begin(size)

    def train_step(self, data_batch: Any, target_batch: Any) -> StepResult:
        """Train on one micro-batch; see `MixedPrecisionTrainer.train_step`."""
        run = self._run
        if run.accumulation == 1 and not run.step.announced:
            return self.train_group([(data_batch, target_batch)])
        return self._micro_batch(data_batch, target_batch)

    def train_group(self, micro_batches: Sequence[tuple[Any, Any]]) -> StepResult:
        """One optimizer step over these micro-batches; see `MixedPrecisionTrainer.train_group`."""
        run = self._run
        if not micro_batches:
            raise StepError("a step has at least one micro-batch")
        if not run.policy.retries:
            return self._whole_step(micro_batches)
        before = RandomStates(run.device)
        try:
            return self._whole_step(micro_batches)
        except torch.OutOfMemoryError:
            transition = run.policy.out_of_memory(run.step.steps)
            if transition is None:
                raise
        # Outside the handler, whose traceback keeps the failed step's tensors alive.
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        before.restore()
        self.flush()
        self._change_precision(transition)
        return self._whole_step(micro_batches)

    def finish_accumulation(self) -> bool:
        """End a step that has fewer micro-batches than announced; False where none is under way."""
        if not self._run.step.finish_accumulation():
            return False
        self._after_step()
        return True

    def replay_decisions(self, decisions: Sequence[dict[str, Any]]) -> None:
        """Decide by memory as before a resume; see `MixedPrecisionTrainer.replay_decisions`."""
        run = self._run
        step = run.step.steps
        transitions = [
            Transition(
                step=int(decision["step"]),
                origin=str(decision["from"]),
                target=str(decision["to"]),
                reason=str(decision["reason"]),
                figures=dict(decision.get("figures", {})),
            )
            for decision in decisions
        ]
        run.policy.replay([transition for transition in transitions if transition.step > step])
        for transition in transitions:
            # Out of memory in the step after the one that was saved: no later decision step would find it.
            if transition.step == step and transition.reason == "out_of_memory" and run.policy.retries:
                self._change_precision(transition)

    def end_epoch(self, metric: float | None) -> None:
        """Step a scheduler of interval "epoch", and raise what must end the run."""
        self.flush()
        self.ledger.supervisor.raise_failure()
        self._run.schedule.end_epoch(metric)

    def flush(self) -> list[FinishedStep]:
        """Read every finished step, count it and deliver its row; returns what was new."""
        run = self._run
        finished = run.step.read()
        if finished:
            run.policy.observe(finished)
            if any(done.cause is not None for done in finished):
                run.step.watch_closely()
            self.ledger.enter(finished)
        return finished

    def check(self) -> None:
        """Raise what must end the run, if anything does.

        Raises:
            TooManySkips, NonFiniteGradient, NonFiniteLoss: as the configuration asks.
        """
        self.flush()
        self.ledger.supervisor.raise_failure()

    @contextmanager
    def evaluation_region(self) -> Iterator[Callable[[Any], Any]]:
        """Evaluate without touching training; see `MixedPrecisionTrainer.evaluation_region`."""
        run = self._run
        if run.step.in_group:
            raise StepError("a step is under way; call finish_accumulation() before evaluating")
        run.step.pause_clock()
        try:
            with evaluating(run.model, run.policy, run.device) as predict:
                yield predict
        finally:
            run.step.pause_clock()

    def get_mixed_precision_stats(self) -> dict[str, Any]:
        """The run so far; see `MixedPrecisionTrainer.get_mixed_precision_stats`."""
        if self._prepared is not None:
            self.flush()
        return self.ledger.statistics(self.performance_metrics)

    def engine_state(self) -> dict[str, Any]:
        """The engine's part of a run between two steps, in primitives and tensors; no weights."""
        run = self._run
        self.flush()
        return {
            "format": STATE_FORMAT,
            "config": self.config.model_dump(mode="json"),
            "compute_dtype": run.resolved.low_dtype,
            "step": run.step.state_dict(),
            "policy": run.policy.state_dict(),
            "supervisor": self.ledger.supervisor.state_dict(),
            "counters": self.state.state_dict(),
        }

    def load_engine_state(self, state: dict[str, Any]) -> list[str]:
        """Take back what `engine_state` gave; returns how its configuration differs from the running one."""
        check_format(state)
        run = self._run
        differences = config_differences(state["config"], self.config.model_dump(mode="json"))
        if state["compute_dtype"] != run.resolved.low_dtype:
            raise StateMismatchError(
                f"the saved run computed in {state['compute_dtype']} and this one would in "
                f"{run.resolved.low_dtype}: use the same mode, precision_level and kind of device"
            )
        run.policy.load_state_dict(state["policy"])
        run.step.load_state_dict(state["step"])
        self.ledger.supervisor.load_state_dict(state["supervisor"])
        self.state.load_state_dict(state["counters"])
        for difference in differences:
            self.logger.warning("saved state: %s", difference)
        return differences

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume of engine, model, optimizer and scheduler needs."""
        run = self._run
        engine = self.engine_state()
        with run.schedule.settled():
            return {
                "engine": engine,
                "schedule": plain(run.schedule.state_dict()),
                "optimizer": plain(run.optimizer.state_dict()),
                "model": dict(run.policy.weights(run.model)),
            }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take back what `state_dict` gave; returns how its configuration differs from the running one."""
        run = self._run
        differences = self.load_engine_state(state["engine"])
        run.policy.load_weights(run.model, state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        return differences

    def save_mixed_precision_state(self, filepath: str | PathLike[str]) -> None:
        """Save the engine's state (not the weights) to a file that loads with `weights_only=True`."""
        torch.save(self.engine_state(), Path(filepath))
        self.logger.info("Mixed precision state saved to %s", filepath)

    def load_mixed_precision_state(self, filepath: str | PathLike[str]) -> list[str]:
        """Load what `save_mixed_precision_state` saved; returns how its configuration differs.

        Raises:
            StateMismatchError: the file is of another format or of a run in another precision.
        """
        state = torch.load(Path(filepath), map_location=self.device, weights_only=True)
        differences = self.load_engine_state(state)
        self.logger.info("Mixed precision state loaded from %s", filepath)
        return differences

    @property
    def _run(self) -> _Run:
        if self._prepared is None:
            raise StepError("call setup_training(model, optimizer, criterion) first")
        return self._prepared

    def _whole_step(self, micro_batches: Sequence[tuple[Any, Any]]) -> StepResult:
        result = self._run.step.whole(micro_batches)
        self._after_step()
        return result

    def _micro_batch(self, data_batch: Any, target_batch: Any) -> StepResult:
        run = self._run
        result = run.step.micro_batch(data_batch, target_batch, default_size=run.accumulation)
        if not run.step.in_group:
            self._after_step()
        return result

    def _after_step(self) -> None:
        run = self._run
        step = run.step.steps
        if step % DECISION_STEPS and not run.policy.decides_after(step):
            return
        self.flush()
        run.schedule.refill()
        transition = run.policy.decide(step)
        if transition is not None:
            self._change_precision(transition)
            if transition.cures:
                self.ledger.supervisor.forgive()
        self.ledger.supervisor.raise_failure()

    def _change_precision(self, transition: Transition) -> None:
        data = {
            "step": transition.step,
            "from": transition.origin,
            "to": transition.target,
            "reason": transition.reason,
            "figures": transition.figures,
        }
        changed = transition.origin != transition.target
        what = f"from {transition.origin} to {transition.target}" if changed else f"stays {transition.origin}"
        # Told before it takes effect: what rests on memory must be on record before a step depends on it.
        self.ledger.tell(
            EngineEvent(
                type="precision",
                level="warning" if changed else "info",
                message=f"after step {transition.step} precision changes {what}: {transition.reason}"
                if changed
                else f"after step {transition.step} precision {what}: {transition.reason}",
                step=transition.step,
                data=data,
            )
        )
        self._run.policy.apply(transition)
        if self._run.step.precision_changed():
            self.state.current_scale = self._run.resolved.initial_scale if self._run.policy.scales else 1.0

    def _tell_unavailable(self, code: str, message: str) -> None:
        step = self._prepared.step.steps if self._prepared is not None else 0
        data = {"code": code}
        self.ledger.tell(EngineEvent(type="warning", level="warning", message=message, step=step, data=data))
