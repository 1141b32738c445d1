"""What the host concludes from finished steps: incidents, budgets, and when a run has failed.

Rows may arrive early or late; everything that changes the run is decided at decision steps, so that a run
and its resumed copy decide alike. Nothing here touches a tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.errors import Cause, NonFiniteError, NonFiniteGradient, NonFiniteLoss, TooManySkips
from halfstep.worker.amp.record.rows import (
    Attribution,
    EngineEvent,
    EventLevel,
    FinishedStep,
    StepRow,
)

QUIET_STEPS = 100
"""After an incident was told, others of its kind are only counted for so many steps."""


class Supervisor:
    """Watches the rows of a run in order.

    Attributes:
        consecutive_skips: skipped steps up to the last one seen.
        last_overflow: {step, layer, kind} of the last overflow; None before the first.
    """

    def __init__(self, config: MixedPrecisionConfig, emit: Callable[[EngineEvent], None]) -> None:
        self._config = config
        self._emit = emit
        self._failure: NonFiniteError | None = None
        self._steps = 0
        self._overflows = 0
        self._budget_told = False
        self._told: dict[str, int] = {}
        self._untold: dict[str, int] = {}
        self.consecutive_skips = 0
        self.last_overflow: dict[str, Any] | None = None

    @property
    def overflow_rate(self) -> float | None:
        """Overflows per step; None while fewer than 1/overflow_threshold steps were seen."""
        if self._steps * self._config.overflow_threshold < 1.0:
            return None
        return self._overflows / self._steps

    @property
    def overflow_budget_exceeded(self) -> bool:
        """The overflow rate is known and above overflow_threshold."""
        rate = self.overflow_rate
        return rate is not None and rate > self._config.overflow_threshold

    def observe(self, finished: Sequence[FinishedStep]) -> None:
        """Take finished steps into account, in order."""
        quiet = not self._overflows or self._budget_told
        if quiet and not any(done.cause or done.range_exhausted for done in finished):
            self._steps += len(finished)
            self.consecutive_skips = 0
            return
        for done in finished:
            self._observe(done)

    def raise_failure(self) -> None:
        """Raise what must end the run, if anything does; called at decision steps and at the end of a run."""
        if self._failure is not None:
            raise self._failure

    def forgive(self) -> None:
        """Forget the current run of skips: a policy has changed the precision to cure it."""
        if isinstance(self._failure, TooManySkips):
            self._failure = None
        self.consecutive_skips = 0

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "steps": self._steps,
            "overflows": self._overflows,
            "budget_told": self._budget_told,
            "told": dict(self._told),
            "untold": dict(self._untold),
            "consecutive_skips": self.consecutive_skips,
            "last_overflow": self.last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._failure = None
        self._steps = state["steps"]
        self._overflows = state["overflows"]
        self._budget_told = state["budget_told"]
        self._told = dict(state["told"])
        self._untold = dict(state["untold"])
        self.consecutive_skips = state["consecutive_skips"]
        self.last_overflow = state["last_overflow"]

    def _observe(self, done: FinishedStep) -> None:
        row, cause = done.row, done.cause
        self._steps += 1
        self._overflows += row.overflow
        if cause is None:
            self.consecutive_skips = 0
        else:
            self._count_bad(row, cause, done.attribution or Attribution(layer=None, kind="unknown"))
        if done.range_exhausted:
            self._tell(
                "range_exhausted",
                "warning",
                f"gradients underflow FP16 at max_scale {self._config.max_scale:g}: use precision_level "
                f"'bf16', "
                "or raise max_scale",
                row.step,
                {"scale": row.scale, "underflow_estimate": row.underflow_estimate},
            )
        if self.overflow_budget_exceeded and not self._budget_told:
            self._budget_told = True
            self._tell(
                "overflow_budget_exceeded",
                "warning",
                f"{self._overflows} of {self._steps} steps were lost to overflow, more than "
                f"overflow_threshold "
                f"{self._config.overflow_threshold:g} allows",
                row.step,
                {"overflow_rate": self.overflow_rate, "overflow_threshold": self._config.overflow_threshold},
            )

    def _count_bad(self, row: StepRow, cause: Cause, attribution: Attribution) -> None:
        self.consecutive_skips += 1
        layer, kind = attribution.layer, attribution.kind
        incident = {"step": row.step, "layer": layer, "kind": kind}
        if row.overflow:
            self.last_overflow = incident
        if self.consecutive_skips == 1:
            self._tell(
                "overflow" if row.overflow else "nan",
                "info" if row.overflow else "warning",
                f"step {row.step} was {'skipped' if row.skipped else 'not finite'}: {_SENTENCES[cause]}"
                + (f", first seen in '{layer}' ({kind})" if layer else ""),
                row.step,
                incident
                | {
                    "cause": cause,
                    "scale": row.scale,
                    "has_inf": row.has_inf,
                    "has_nan": row.has_nan,
                    "where": attribution.where,
                    "largest_finite": attribution.largest_finite,
                    "verdict": attribution.verdict,
                },
            )
        if self._failure is None:
            self._failure = self._failed(row, cause, layer)

    def _failed(self, row: StepRow, cause: Cause, layer: str | None) -> NonFiniteError | None:
        where = f" in '{layer}'" if layer else ""
        if self.consecutive_skips >= self._config.max_consecutive_skips:
            return TooManySkips(
                f"{self.consecutive_skips} steps in a row were not finite, the last one at step "
                f"{row.step}{where}: "
                f"{_SENTENCES[cause]}. {_REMEDIES[cause]}",
                cause=cause,
                layer=layer,
                step=row.step,
            )
        handled = self._config.overflow_handling if row.overflow else self._config.nan_handling
        if handled or not self._config.enabled:
            return None
        field = "overflow_handling" if row.overflow else "nan_handling"
        failure = NonFiniteLoss if cause == "non_finite_loss" else NonFiniteGradient
        return failure(
            f"step {row.step}: {_SENTENCES[cause]}{where}, and {field} is false. {_REMEDIES[cause]}",
            cause=cause,
            layer=layer,
            step=row.step,
        )

    def _tell(self, kind: str, level: EventLevel, message: str, step: int, data: dict[str, Any]) -> None:
        if kind in self._told and step - self._told[kind] < QUIET_STEPS:
            self._untold[kind] = self._untold.get(kind, 0) + 1
            return
        self._told[kind] = step
        untold = self._untold.pop(kind, 0)
        self._emit(
            EngineEvent(
                type=kind, level=level, message=message, step=step, data=data | {"not_told_before": untold}
            )
        )


_SENTENCES: dict[Cause, str] = {
    "non_finite_gradients": "its gradients were not finite",
    "non_finite_loss": "its loss was not finite",
    "scale_exhausted": "its gradients were not finite at the smallest scale allowed",
}
_REMEDIES: dict[Cause, str] = {
    "non_finite_gradients": "Lower the learning rate or initial_scale, or use precision_level 'bf16'",
    "non_finite_loss": "Look for bad samples, lower the learning rate, or use precision_level 'bf16' or "
    "'fp32'",
    "scale_exhausted": "Use precision_level 'bf16' or 'fp32', or lower min_scale",
}
