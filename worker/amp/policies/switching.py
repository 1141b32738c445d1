"""Full and low precision in one run: mode ADAPTIVE, and level DYNAMIC of the other modes.

Every change is a `Transition`, taken at a decision step. One that rests on memory cannot be derived from the
run again; `replay` makes a resumed run take it where the first one did.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.batches import shapes_of
from halfstep.worker.amp.layers import BorderCast
from halfstep.worker.amp.policies.interface import PrecisionPolicy, Transition
from halfstep.worker.amp.policies.ladder import InstabilityLadder
from halfstep.worker.amp.policies.selective import SelectivePolicy
from halfstep.worker.amp.record.memory import MemoryMonitor
from halfstep.worker.amp.record.rows import FinishedStep

PROBE_STEPS = 3
"""Full-precision steps after which the peak memory is looked at."""

FULL = "float32"
_BY_MEMORY = frozenset({"memory", "memory_fits", "out_of_memory"})


class SwitchingPolicy(PrecisionPolicy):
    """A low-precision policy that is switched off where it is unstable, and on where memory asks for it."""

    def __init__(
        self, config: MixedPrecisionConfig, low: PrecisionPolicy, *, memory_rule: bool, memory: MemoryMonitor
    ) -> None:
        self._config = config
        self._low = low
        self._memory_rule = memory_rule
        self._memory = memory
        self._ladder = InstabilityLadder(config)
        self._in_low = not memory_rule
        self._latched = False
        self._probe_ends = PROBE_STEPS if memory_rule else 0
        self._probed_shapes: set[str] = set()
        self._new_shape = False
        self._last_low_layers: tuple[str, ...] = ()
        self._replayed: dict[int, Transition] = {}
        self._switch(in_low=self._in_low)

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]  # it changes in the run
        """Of the coming step."""
        return self._low.compute_dtype if self._in_low else torch.float32

    @property
    def scales(self) -> bool:  # type: ignore[override]  # it changes in the run
        """Whether the coming step's loss is scaled."""
        return self._in_low and self._low.scales

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Prepare the low-precision policy."""
        self._low.attach(model, optimizer)
        self._switch(in_low=self._in_low)

    def detach(self) -> None:
        """As the low policy's."""
        self._low.detach()

    def region(self) -> AbstractContextManager[object]:
        """The low policy's region while it is on."""
        return self._low.region() if self._in_low else nullcontext()

    def full_precision(self) -> AbstractContextManager[object]:
        """As the low policy's."""
        return self._low.full_precision()

    def borders(self) -> Iterable[BorderCast]:
        """As the low policy's."""
        return self._low.borders()

    def notices(self) -> Iterable[str]:
        """As the low policy's."""
        return self._low.notices()

    def saw_input(self, batch: Any) -> None:
        """A shape that full precision has not met yet may need more memory than those before."""
        if not self.retries:
            return
        shape = repr(shapes_of(batch))
        if shape not in self._probed_shapes:
            self._probed_shapes.add(shape)
            self._new_shape = True

    def observe(self, finished: Sequence[FinishedStep]) -> None:
        """Take finished steps into account."""
        for done in finished:
            self._ladder.observe(done, low=done.row.compute_dtype != FULL)

    def decides_after(self, step: int) -> bool:
        """The end of the memory probe, and where an earlier life of the run decided by memory."""
        return step == self._probe_ends or step in self._replayed

    def decide(self, step: int) -> Transition | None:
        """What changes after `step`, if anything does."""
        if step in self._replayed:
            return self._replayed.pop(step)
        if not self._in_low:
            return self._by_memory(step) or self._promotion(step)
        complaint = self._ladder.complaint()
        if complaint is None:
            return None
        reason, figures = complaint
        return Transition(
            step=step, origin=self._name(), target=self._demoted(figures), reason=reason, figures=figures
        )

    @property
    def retries(self) -> bool:
        """A full-precision step that does not fit can be tried again in low precision."""
        return self._memory_rule and not self._in_low

    def out_of_memory(self, step: int) -> Transition | None:
        """What changes because full precision did not fit; None where nothing is left to change."""
        if not self.retries:
            return None
        return Transition(step=step, origin=FULL, target=self._low_name(), reason="out_of_memory", figures={})

    def apply(self, transition: Transition) -> None:
        """Let a transition take effect."""
        if transition.reason in _BY_MEMORY:
            self._new_shape = False
            self._latched = self._latched or transition.target != FULL
        if transition.target == transition.origin:
            return
        was_low = self._in_low
        self._restrict(transition.target)
        self._switch(in_low=transition.target != FULL)
        if not self._in_low or was_low:
            self._ladder.demoted()
        elif transition.reason == "dwell":
            self._ladder.promoted()

    def replay(self, transitions: Sequence[Transition]) -> None:
        """Make these of an earlier life of the run again at their steps, instead of measuring memory."""
        self._replayed.update({t.step: t for t in transitions if t.reason in _BY_MEMORY})

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "in_low": self._in_low,
            "latched": self._latched,
            "probed_shapes": sorted(self._probed_shapes),
            "new_shape": self._new_shape,
            "ladder": self._ladder.state_dict(),
            "low": self._low.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._latched = bool(state["latched"])
        self._probed_shapes = set(state["probed_shapes"])
        self._new_shape = bool(state["new_shape"])
        self._ladder.load_state_dict(state["ladder"])
        self._low.load_state_dict(state["low"])
        self._switch(in_low=bool(state["in_low"]))

    def _by_memory(self, step: int) -> Transition | None:
        if not self._memory_rule or self._latched or step < self._probe_ends or not self._new_shape:
            return None
        share = self._memory.peak_share()
        fits = share <= self._config.adaptive_threshold
        figures = {"peak_share": share, "adaptive_threshold": self._config.adaptive_threshold}
        return Transition(
            step=step,
            origin=FULL,
            target=FULL if fits else self._low_name(),
            reason="memory_fits" if fits else "memory",
            figures=figures,
        )

    def _promotion(self, step: int) -> Transition | None:
        demoted = self._latched or not self._memory_rule
        if not demoted or not self._ladder.may_promote():
            return None
        return Transition(step=step, origin=FULL, target=self._low_name(), reason="dwell", figures={})

    def _demoted(self, figures: dict[str, Any]) -> str:
        """Full precision; for selected layers only the one that the trouble came from, where it is known."""
        layer = figures.get("layer")
        if isinstance(self._low, SelectivePolicy) and layer is not None:
            guilty = self._low.subtree_of(layer)
            left = [name for name in self._low.lowered if name != guilty]
            if guilty is not None and left:
                return self._name_of(left)
        return FULL

    def _name(self) -> str:
        return self._low_name() if self._in_low else FULL

    def _low_name(self) -> str:
        if isinstance(self._low, SelectivePolicy):
            return self._name_of(self._low.lowered or self._last_low_layers)
        return str(self._low.compute_dtype).removeprefix("torch.")

    def _name_of(self, layers: Iterable[str]) -> str:
        return f"{str(self._low.compute_dtype).removeprefix('torch.')}: {', '.join(layers)}"

    def _restrict(self, target: str) -> None:
        if isinstance(self._low, SelectivePolicy):
            self._last_low_layers = self._low.lowered or self._last_low_layers
            if target != FULL:
                self._last_low_layers = tuple(target.partition(": ")[2].split(", "))

    def _switch(self, *, in_low: bool) -> None:
        self._in_low = in_low
        if isinstance(self._low, SelectivePolicy):
            self._last_low_layers = self._last_low_layers or self._low.lowered
            self._low.lower(self._last_low_layers if in_low else ())
