"""One run between two step boundaries: model, engine, place in the data, and what is due.

`loop` decides the order of things; each thing that a run can do is a method here.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.speed import Speeds, slow_precision
from halfstep.service.faultpoints import reach
from halfstep.service.files.remote import Mirror
from halfstep.worker.amp import MixedPrecisionTrainer
from halfstep.worker.amp.record.rows import EngineEvent
from halfstep.worker.training import randomness
from halfstep.worker.training.account import Account
from halfstep.worker.training.assembly import Assembly, assemble
from halfstep.worker.training.checkpoints.keeping import Keeping
from halfstep.worker.training.checkpoints.reading import load, load_newest
from halfstep.worker.training.checkpoints.writing import CheckpointRef, Payload
from halfstep.worker.training.data.batches import Batches
from halfstep.worker.training.data.plan import Plan, Position, excluded_from
from halfstep.worker.training.device import environment
from halfstep.worker.training.errors import CheckpointDamaged, StorageFailed
from halfstep.worker.training.evaluation import evaluate
from halfstep.worker.training.failures import translated
from halfstep.worker.training.observer import Observer
from halfstep.worker.training.progress import RecentSteps

_OWN_TYPES = frozenset({"precision", "overflow", "nan", "warning"})
"""Engine events that keep their type; the others are alerts."""

_INCIDENTS = frozenset({"overflow", "nan"})
"""Engine events of a step that went bad."""

_MOST_PENDING = 4096

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Run:
    """A job being trained. Made whole by the constructor, which builds or restores everything.

    Attributes:
        step: optimizer steps taken, those before the checkpoint included.
        resumed_from: the step of the checkpoint it went on from; 0: from scratch.
        plan: how the data become steps.
    """

    def __init__(
        self,
        spec: JobSpec,
        observer: Observer,
        *,
        device: torch.device,
        directory: Path,
        fence: int,
        text_roots: Sequence[Path],
        flush_seconds: float,
        resume: Sequence[CheckpointRef],
        decisions: list[dict[str, Any]],
        excluded: frozenset[Position],
        speeds: Speeds,
        mirror: Mirror | None,
    ) -> None:
        self._spec = spec
        self._observer = observer
        self._device = device
        self._flush_seconds = flush_seconds
        self._account = Account(patience=spec.precision.max_consecutive_skips)
        self._events: list[EngineEvent] = []
        self._evaluated_at = 0
        self._flush_at = 0.0
        self._data_fingerprint: str | None = None
        self.step = self.resumed_from = 0

        damaged: list[CheckpointDamaged] = []
        found = load_newest(resume, damaged.append, partial(load, mirror=mirror))
        state: dict[str, Any] = dict(found[1].state) if found else {}
        excluded |= excluded_from(state.get("excluded", ()))
        randomness.seed_all(spec.training.seed)
        with translated(spec, "building the job"):
            self._parts = self._assemble(text_roots, excluded)
            self._trainer = self._prepare_engine()
        self.plan = self._parts.plan
        self._batches = Batches(self._parts.dataset.train, self.plan, seed=spec.training.seed, device=device)
        self._position = self.plan.first()
        self._keeping = Keeping(
            spec.training, directory=directory, fence=fence, mirror=mirror, known=resume[len(damaged) :]
        )
        if found:
            self._restore(found[1])
        self._decisions = decisions
        self._trainer.replay_decisions([decision for decision in decisions if "from" in decision])
        self._announce(resume[: len(damaged)], damaged, state, speeds)
        # Building the job was no training, and its time counts for nothing.
        self._account.recent = RecentSteps()
        self._keeping.put_off()

    @property
    def done(self) -> bool:
        """Every step of the job is taken."""
        return self.plan.total_steps is not None and self.step >= self.plan.total_steps

    @property
    def skipped(self) -> list[tuple[int, Position]]:
        """Step and place of each step of the latest run of skips, the hopeless one where there was one."""
        return self._account.skipped

    @property
    def checkpoints(self) -> list[CheckpointRef]:
        """Those of the job that can be gone back to, newest first."""
        return self._keeping.known

    def take_step(self) -> None:
        """Train on the next group of micro-batches."""
        with translated(self._spec, f"step {self.step + 1}"):
            reach("child.step")
            group = self._batches.group(self._position)
            self._account.begin(self.step + 1, self._position)
            self._trainer.train_group(group)
        self._account.recent.count(self._batches.samples(self._position))
        self.step += 1

    def pass_boundary(self) -> None:
        """Close an epoch that ended, and do what is due: evaluation, report, checkpoint."""
        before, self._position = self._position, self.plan.after(self._position)
        epoch_ended = self._position.epoch > before.epoch
        if epoch_ended:
            with translated(self._spec, f"epoch {before.epoch}"):
                self._trainer.end_epoch()
        training = self._spec.training
        every = training.evaluate_every_steps
        if epoch_ended if every is None else self.step % every == 0:
            self._evaluate()
        now = time.monotonic()
        if now >= self._flush_at or self._account.waiting >= _MOST_PENDING:
            self.report()
        if self._keeping.due(self.step, now):
            self._save(required=False)

    def stop(self, *, keep: bool) -> None:
        """Leave between two steps; `keep` writes a checkpoint to go on from."""
        self.report()
        if keep:
            self._save(required=False)

    def finish(self) -> None:
        """After the last step: its evaluation, and a checkpoint that holds the result."""
        with translated(self._spec, f"step {self.step}"):
            self._trainer.check()
        self._evaluate()
        self._save(required=True)

    def report(self) -> None:
        """Tell the observer of every finished step, then of what happened in them."""
        with translated(self._spec, f"step {self.step}"):
            self._trainer.flush()
        self.tell_rows()

    def tell_rows(self) -> None:
        """Report what was read so far; after a failure the engine is not asked again."""
        self._account.recent.mark()
        rows = self._account.take()
        events, self._events = self._events, []
        if rows:
            self._account.recent.add(rows)
            self._observer.steps(rows, self._account.live(self._trainer.get_mixed_precision_stats()))
        for event in events:
            self._tell(event)
        self._flush_at = time.monotonic() + self._flush_seconds

    def _assemble(self, text_roots: Sequence[Path], excluded: frozenset[Position]) -> Assembly:
        training = self._spec.training

        def plan(samples: int) -> Plan:
            return Plan(
                samples=samples,
                batch_size=training.batch_size,
                accumulation=training.gradient_accumulation_steps,
                epochs=self._spec.epochs,
                max_steps=training.max_steps,
                excluded=excluded,
            )

        return assemble(self._spec, self._device, text_roots, plan)

    def _prepare_engine(self) -> MixedPrecisionTrainer:
        trainer = MixedPrecisionTrainer(self._spec.precision)
        trainer.on_event = self._take_event
        trainer.on_step = self._account.finish
        trainer.setup_training(
            self._parts.model,
            self._parts.optimizer,
            self._parts.criterion,
            self._parts.scheduler,
            device=self._device,
            scheduler_interval=self._parts.scheduler_interval,
            gradient_accumulation_steps=self._spec.training.gradient_accumulation_steps,
            capture=self._spec.training.capture,
            compile=self._spec.training.compile,
        )
        self._parts.model.train()
        return trainer

    def _announce(
        self,
        damaged_refs: Sequence[CheckpointRef],
        damaged: Sequence[CheckpointDamaged],
        state: dict[str, Any],
        speeds: Speeds,
    ) -> None:
        self._observer.opened(total_steps=self.plan.total_steps)
        self._observer.resumed(self.resumed_from)
        for damage in damaged:
            instead = f"that of step {self.resumed_from}" if self.resumed_from else "the start"
            self._observer.event(
                "checkpoint",
                "warning",
                f"{damage.message}; training goes on from {instead}",
                damage.detail | {"code": "checkpoint_damaged", "resumed_from": self.resumed_from},
            )
        if damaged_refs:
            self._observer.superseded(damaged_refs)
        if not state:
            self._warn_of_slow_precision(speeds)
        else:
            self._events.clear()  # told when the job began
            changed = environment.differences(state["environment"], self._environment())
            if changed:
                listed = ", ".join(f"{name} {then} → {now}" for name, (then, now) in changed.items())
                self._observer.event(
                    "warning",
                    "warning",
                    f"the resumed run may differ in its last bits from an uninterrupted one: {listed}",
                    {"code": "resume_not_exact", "differences": changed, "step": self.step},
                )

    def _warn_of_slow_precision(self, speeds: Speeds) -> None:
        slow = slow_precision(
            self._spec.precision,
            self._trainer.mixed_precision_manager.resolved.low_dtype,
            speeds,
            convolutional=any(isinstance(module, _CONVOLUTIONS) for module in self._parts.model.modules()),
        )
        if slow is not None:
            self._observer.event(
                "precision",
                "warning",
                slow.sentence(f"this worker's {'GPU' if self._device.type == 'cuda' else 'CPU'}"),
                {"code": "slow_precision", "compute_dtype": slow.dtype, "relative_speed": slow.relative},
            )

    def _take_event(self, event: EngineEvent) -> None:
        if event.type != "precision":
            self._events.append(self._with_batch(event))
            return
        # At once, since it takes effect next: a resumed run must find it, whatever happens to this one.
        self._tell(event)
        self._decisions.append(event.data | {"step": event.step})

    def _with_batch(self, event: EngineEvent) -> EngineEvent:
        """The event of a bad step with the place of its batches: after a rollback a step has others."""
        place = self._account.place_of(event.step) if event.type in _INCIDENTS else None
        if place is None:
            return event
        return replace(event, data=event.data | {"batch": [place.epoch, place.group]})

    def _tell(self, event: EngineEvent) -> None:
        own = event.type in _OWN_TYPES
        data = {"code": event.type} | event.data | {"step": event.step}
        self._observer.event(event.type if own else "alert", event.level, event.message, data)

    def _evaluate(self) -> None:
        if self._parts.dataset.held_out is None or self._evaluated_at == self.step:
            return
        self.report()
        self._account.recent.leave()
        with translated(self._spec, f"the evaluation after step {self.step}"):
            evaluation = evaluate(
                self._parts.dataset,
                self._parts.criterion,
                self._trainer.evaluation_region(),
                step=self.step,
                batch_size=self._spec.training.batch_size,
                device=self._device,
            )
        if self._parts.scheduler_needs_evaluation:
            self._parts.scheduler.step(evaluation.loss)
        self._evaluated_at, self._account.evaluation = self.step, evaluation
        self._keeping.score(evaluation.loss, self.step)
        self._account.recent.come_back()
        self._observer.evaluated(evaluation)

    def _save(self, *, required: bool) -> None:
        self._keeping.put_off()
        if self._keeping.has(self.step):
            return
        # A run that has failed is not worth keeping: its failure would be lost with the process.
        with translated(self._spec, f"step {self.step}"):
            self._trainer.check()
        self.report()
        self._account.recent.leave()
        payload = self._payload()
        try:
            kept = self._keeping.write(
                self.step,
                payload,
                metrics=self._account.figures(self.step),
                rollbacks=int(bool(self.plan.excluded)),
            )
        except StorageFailed as failure:
            if required:
                raise
            # The checkpoints before it are whole, and the next one may succeed: a full disk, or a store that
            # is away, need not end a long job.
            self._observer.event(
                "checkpoint", "error", failure.message, failure.detail | {"code": "checkpoint_failed"}
            )
            return
        finally:
            self._account.recent.come_back()
        self._observer.checkpointed(kept.info)
        if kept.superseded:
            self._observer.superseded(kept.superseded)

    def _payload(self) -> Payload:
        engine = self._trainer.state_dict()
        weights = engine.pop("model")
        return Payload(
            weights=weights,
            state={
                "engine": engine,
                "rng": randomness.capture(self._device),
                "step": self.step,
                "position": [self._position.epoch, self._position.group],
                "excluded": sorted([place.epoch, place.group] for place in self.plan.excluded),
                "evaluated_at": self._evaluated_at,
                "environment": self._environment(),
            }
            | self._account.state()
            | self._keeping.state(),
        )

    def _restore(self, payload: Payload) -> None:
        state = payload.state
        with translated(self._spec, f"restoring the checkpoint of step {state['step']}"):
            self._trainer.load_state_dict(state["engine"] | {"model": dict(payload.weights)})
        self.step = self.resumed_from = state["step"]
        self._position = Position(*state["position"])
        self._evaluated_at = state["evaluated_at"]
        self._account.restore(state)
        self._keeping.restore(state, self.step)
        # Last: building the job has drawn from the generators.
        randomness.restore(state["rng"], self._device)

    def _environment(self) -> dict[str, Any]:
        if self._data_fingerprint is None:
            self._data_fingerprint = self._parts.dataset.train.fingerprint()
        described = environment.describe(self._device, deterministic=self._spec.training.deterministic)
        return described | {"data": self._data_fingerprint}
