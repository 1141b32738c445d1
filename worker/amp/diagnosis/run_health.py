"""What the host concludes from finished steps: incidents, budgets, and when a run has failed.

Rows may arrive early or late; everything that changes the run is decided at decision steps, so that a run
and its resumed copy decide alike. Nothing here touches a tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.diagnosis.advice import advice
from halfstep.worker.amp.errors import (
    Cause,
    NonFiniteError,
    NonFiniteGradient,
    NonFiniteLoss,
    TooManySkips,
    Verdict,
)
from halfstep.worker.amp.record.rows import Attribution, EngineEvent, EventLevel, FinishedStep, StepRow

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
        self._first_seen = _NOWHERE
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
            "first_seen": [self._first_seen.layer, self._first_seen.kind, self._first_seen.verdict],
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
        layer, kind, verdict = state.get("first_seen", (None, "unknown", None))  # absent before it was kept
        self._first_seen = Attribution(layer=layer, kind=kind, verdict=verdict)

    def _observe(self, done: FinishedStep) -> None:
        row, cause = done.row, done.cause
        self._steps += 1
        self._overflows += row.overflow
        if cause is None:
            self.consecutive_skips = 0
        else:
            self._count_bad(row, cause, done.attribution or _NOWHERE)
        if done.range_exhausted:
            self._tell(
                "range_exhausted",
                "warning",
                f"gradients underflow FP16 at max_scale {self._config.max_scale:g}. "
                + advice("range_exhausted", self._config, dtype=row.compute_dtype),
                row.step,
                {"scale": row.scale, "underflow_estimate": row.underflow_estimate},
            )
        if self.overflow_budget_exceeded and not self._budget_told:
            self._budget_told = True
            self._tell(
                "overflow_budget_exceeded",
                "warning",
                f"{self._overflows} of {self._steps} steps were lost to overflow, "
                f"more than overflow_threshold {self._config.overflow_threshold:g} allows",
                row.step,
                {"overflow_rate": self.overflow_rate, "overflow_threshold": self._config.overflow_threshold},
            )

    def _count_bad(self, row: StepRow, cause: Cause, attribution: Attribution) -> None:
        self.consecutive_skips += 1
        layer, kind = attribution.layer, attribution.kind
        incident = {"step": row.step, "layer": layer, "kind": kind}
        if row.overflow:
            self.last_overflow = incident
        # Only the first step of a run of bad ones is repeated: what it showed is told of them all.
        if self.consecutive_skips == 1 or self._first_seen.layer is None:
            self._first_seen = attribution
        if self.consecutive_skips == 1:
            self._tell(
                "overflow" if row.overflow else "nan",
                "info" if row.overflow else "warning",
                f"step {row.step} was {'skipped' if row.skipped else 'not finite'}: {_SENTENCES[cause]}"
                f"{_seen(attribution)}",
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
            self._failure = self._failed(row, cause)

    def _failed(self, row: StepRow, cause: Cause) -> NonFiniteError | None:
        seen = self._first_seen
        told = f"{_SENTENCES[cause]}{_seen(seen)}"
        remedy = advice(cause, self._config, dtype=row.compute_dtype, verdict=seen.verdict, layer=seen.layer)
        kind: type[NonFiniteError]
        if self.consecutive_skips >= self._config.max_consecutive_skips:
            skips, kind = self.consecutive_skips, TooManySkips
            message = f"{skips} steps in a row were not finite, {row.step - skips + 1} to {row.step}: {told}"
        else:
            handled = self._config.overflow_handling if row.overflow else self._config.nan_handling
            if handled or not self._config.enabled:
                return None
            field = "overflow_handling" if row.overflow else "nan_handling"
            kind = NonFiniteLoss if cause == "non_finite_loss" else NonFiniteGradient
            message = f"step {row.step}: {told}, and {field} is false"
        return kind(
            f"{message}. {remedy}", cause=cause, layer=seen.layer, step=row.step, verdict=seen.verdict
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
_VERDICTS: dict[Verdict | None, str] = {
    "precision": "; the same step is finite in FP32",
    "data_or_model": "; the same step is not finite in FP32 either",
    None: "",
}
_NOWHERE = Attribution(layer=None, kind="unknown")


def _seen(attribution: Attribution) -> str:
    where = f", first seen in '{attribution.layer}' ({attribution.kind})" if attribution.layer else ""
    return where + _VERDICTS[attribution.verdict]
