"""When low precision has become unstable, and when it may be tried again.

Fed with every finished step in order and asked only at decision steps, so that its answers depend on the run
alone.
"""

from typing import Any

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.record.rows import FinishedStep

NANS_IN_A_ROW = 3
OVERFLOW_SHARE_FACTOR = 100.0
PROMOTIONS = 3


class InstabilityLadder:
    """Counts what speaks against low precision while it is used, and good steps while it is not."""

    def __init__(self, config: MixedPrecisionConfig) -> None:
        self._window = config.scale_window
        self._tolerated_share = OVERFLOW_SHARE_FACTOR * config.overflow_threshold
        self._promotions = 0
        self._good_steps = 0
        self._nans_in_a_row = 0
        self._worst_nans_in_a_row = 0
        self._exhausted = False
        self._overflow_steps: list[int] = []
        self._layer: str | None = None

    def observe(self, done: FinishedStep, *, low: bool) -> None:
        """Take one finished step into account.

        Args:
            done: the step.
            low: it ran in low precision.
        """
        row = done.row
        if not low:
            self._good_steps += not (row.nan or row.overflow)
            return
        self._nans_in_a_row = self._nans_in_a_row + 1 if row.nan else 0
        self._worst_nans_in_a_row = max(self._worst_nans_in_a_row, self._nans_in_a_row)
        self._exhausted = self._exhausted or done.cause == "scale_exhausted"
        if row.overflow:
            self._overflow_steps.append(row.step)
        oldest = row.step - self._window
        while self._overflow_steps and self._overflow_steps[0] <= oldest:
            del self._overflow_steps[0]
        if done.attribution is not None and done.attribution.layer is not None:
            self._layer = done.attribution.layer

    def complaint(self) -> tuple[str, dict[str, Any]] | None:
        """Why low precision is unstable, with the figures that say so; None where it is not."""
        if self._exhausted:
            return "scale_exhausted", {"layer": self._layer}
        if self._worst_nans_in_a_row >= NANS_IN_A_ROW:
            return "nan", {"nan_in_a_row": self._worst_nans_in_a_row, "layer": self._layer}
        share = len(self._overflow_steps) / self._window
        if share > self._tolerated_share:
            return "overflow_share", {
                "overflow_share": share,
                "tolerated_share": self._tolerated_share,
                "layer": self._layer,
            }
        self._worst_nans_in_a_row = self._nans_in_a_row
        return None

    def may_promote(self) -> bool:
        """The dwell in full precision is over; it doubles each time, and there are three times at most."""
        return self._promotions < PROMOTIONS and self._good_steps >= self._window * 2**self._promotions

    def demoted(self) -> None:
        """Full precision starts: count the dwell from nothing."""
        self._enter()

    def promoted(self) -> None:
        """Low precision starts again: complaints from nothing."""
        self._promotions += 1
        self._enter()

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "promotions": self._promotions,
            "good_steps": self._good_steps,
            "nans_in_a_row": self._nans_in_a_row,
            "worst_nans_in_a_row": self._worst_nans_in_a_row,
            "exhausted": self._exhausted,
            "overflow_steps": list(self._overflow_steps),
            "layer": self._layer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._promotions = int(state["promotions"])
        self._good_steps = int(state["good_steps"])
        self._nans_in_a_row = int(state["nans_in_a_row"])
        self._worst_nans_in_a_row = int(state["worst_nans_in_a_row"])
        self._exhausted = bool(state["exhausted"])
        self._overflow_steps = list(state["overflow_steps"])
        self._layer = state["layer"]

    def _enter(self) -> None:
        self._good_steps = 0
        self._nans_in_a_row = 0
        self._worst_nans_in_a_row = 0
        self._exhausted = False
        self._overflow_steps = []
        self._layer = None
