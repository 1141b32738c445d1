"""The record of steps: what the rows of the ring mean, together with what only the host knows of a step.

Rows are worked out many at a time, as columns. Nothing here happens inside a step but `add`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from halfstep.service.contract.precision import ComputeDtype
from halfstep.worker.amp.errors import Cause
from halfstep.worker.amp.layers import ParameterOrder
from halfstep.worker.amp.record.memory import MemorySample
from halfstep.worker.amp.record.ring import HEAD, Rows, StepRing
from halfstep.worker.amp.record.rows import Attribution, FinishedStep, StepRow
from halfstep.worker.amp.update.learning_rates import Schedule

Flags = npt.NDArray[np.bool_]


class Terms(NamedTuple):
    """Under which terms a step ran; they change at decision steps alone."""

    enabled: bool
    """A bad step is skipped."""
    scales: bool
    """The loss is scaled."""
    compute_dtype: ComputeDtype
    min_scale: float
    underflow_threshold: float


class HostPart(NamedTuple):
    """What only the host knows of a step as it ends."""

    learning_rate: float
    """NaN where the device picked it."""
    memory: MemorySample
    micro_batches: int
    gradients: tuple[int, ...] | None
    """Which parameters had a gradient, by index; None: all."""
    rounding: float
    """The numerator of the underflow estimate; 0 where nothing is computed in FP16."""
    attribution: Attribution | None
    """Where it went bad, if it was repeated to find out."""


class Meaning(NamedTuple):
    """What the heads of some rows say, a column each."""

    grad_bad: Flags
    bad: Flags
    overflow: Flags
    nan: Flags
    underflow: Flags
    skipped: Flags
    underflow_estimate: Rows


def rounding_of(elements: int) -> float:
    """The numerator of the underflow estimate sqrt(N) * 2^-25 / (S * ||g||).

    That is the relative L2 rounding that FP16's absolute spacing of 2^-24 below 2^-14 puts on a gradient
    stored in it.
    """
    return math.sqrt(elements) * 2.0**-25


def meaning_of(heads: Rows, rounding: Rows, terms: Terms) -> Meaning:
    """Work out the flags of some rows.

    Args:
        heads: (rows, len(HEAD)).
        rounding: `HostPart.rounding` of each, (rows,).
        terms: those that all of the rows ran under.
    """
    loss, grad_norm, scale, _, grad_flag, _ = heads.T
    grad_bad, loss_bad = grad_flag > 0, ~np.isfinite(loss)
    bad = grad_bad | loss_bad
    overflow = grad_bad & ~loss_bad & (scale > terms.min_scale) if terms.scales else np.zeros_like(bad)
    with np.errstate(all="ignore"):
        estimate = np.where(rounding > 0, rounding * (1 / (scale * grad_norm)), np.float32(0))
    return Meaning(
        grad_bad=grad_bad,
        bad=bad,
        overflow=overflow,
        nan=bad & ~overflow,
        underflow=(estimate > terms.underflow_threshold) & ~bad,
        skipped=bad if terms.enabled else np.zeros_like(bad),
        underflow_estimate=estimate,
    )


class StepRecord:
    """Steps as they are written, and as the host reads them, in order."""

    def __init__(self, ring: StepRing, *, order: ParameterOrder, schedule: Schedule) -> None:
        self._ring = ring
        self._order = order
        self._schedule = schedule
        self._pending: list[HostPart] = []
        self._read_steps = 0

    def add(self, part: HostPart) -> None:
        """Add the host's part of the step whose row was just written."""
        self._ring.count()
        self._pending.append(part)

    def read(self, times_of: Callable[[int], list[float]], terms: Terms) -> list[FinishedStep]:
        """Every finished step not yet read, in order.

        Args:
            times_of: gives the times in ms of so many steps; asked once the device has finished them.
            terms: those that they ran under.
        """
        rows, parts, self._pending = self._ring.read(), self._pending, []
        if not parts:
            return []
        heads, norms = rows[:, : len(HEAD)], rows[:, len(HEAD) :]
        for index, part in enumerate(parts):
            if part.gradients is not None:
                norms[index, len(part.gradients) :] = 0.0
        rates, memory, micro_batches, gradients, rounding, attributions = zip(*parts, strict=True)
        meaning = meaning_of(heads, np.asarray(rounding, dtype=np.float32), terms)
        loss, grad_norm, scale, next_scale, _, exhausted = heads.T
        seen_inf = np.isinf(norms).any(axis=1) | np.isinf(loss)
        seen_nan = np.isnan(norms).any(axis=1) | np.isnan(loss)
        skipped = meaning.skipped.tolist()
        picked = self._schedule.saw(skipped)
        first, self._read_steps = self._read_steps + 1, self._read_steps + len(parts)
        # By place, as StepRow and FinishedStep have their fields: a thousand rows a second pass here.
        finished = list(
            map(
                StepRow._make,
                zip(
                    range(first, first + len(parts)),
                    loss.tolist(),
                    scale.tolist(),
                    meaning.overflow.tolist(),
                    meaning.nan.tolist(),
                    meaning.underflow.tolist(),
                    skipped,
                    (meaning.bad & seen_inf).tolist(),
                    seen_nan.tolist(),
                    meaning.underflow_estimate.tolist(),
                    grad_norm.tolist(),
                    rates if picked is None else picked,
                    *zip(*memory, strict=True),
                    times_of(len(parts)),
                    [terms.compute_dtype] * len(parts),
                    strict=True,
                ),
            )
        )
        causes: list[Cause | None] = [None] * len(parts)
        places: list[Attribution | None] = list(attributions)
        for index in np.flatnonzero(meaning.bad).tolist():
            row = finished[index]
            causes[index] = _cause(row, grad_bad=bool(meaning.grad_bad[index]), terms=terms)
            places[index] = places[index] or self._from_norms(row, norms[index], gradients[index])
        return list(
            map(
                FinishedStep._make,
                zip(
                    finished,
                    causes,
                    places,
                    next_scale.tolist(),
                    micro_batches,
                    (exhausted > 0).tolist(),
                    strict=True,
                ),
            )
        )

    def restart(self, steps: int) -> None:
        """Count on from `steps`; what was not read is forgotten."""
        self._ring.read()
        self._pending.clear()
        self._read_steps = steps

    def _from_norms(self, row: StepRow, norms: Rows, present: tuple[int, ...] | None) -> Attribution:
        """What the norms tell without repeating the step: a backward overflow enters at the deepest layer."""
        if not math.isfinite(row.loss):
            return Attribution(layer=None, kind="forward")
        bad = np.flatnonzero(~np.isfinite(norms)).tolist()
        indices = bad if present is None else [present[place] for place in bad]
        return Attribution(layer=self._order.deepest(indices), kind="backward")


def _cause(row: StepRow, *, grad_bad: bool, terms: Terms) -> Cause:
    if not math.isfinite(row.loss):
        return "non_finite_loss"
    scaled = terms.scales or terms.compute_dtype == "float16"
    if grad_bad and not row.overflow and scaled and row.scale <= terms.min_scale:
        return "scale_exhausted"
    return "non_finite_gradients"
