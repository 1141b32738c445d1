"""The loss scale and the rule by which it moves, the same on the device and on the host.

Everything here happens at the end of a step without a host read. Which steps are skipped is decided by the
caller; what the host concludes from many steps (budgets, alerts) is in `supervision`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfstep.service.contract.precision import MixedPrecisionConfig

EARLY_GROWTH_RUN = 32
"""Underflowed steps in a row after which a growth is tried without waiting for the window."""

EARLY_GROWTH_ROOM = 2.0**14
"""The largest scaled gradient norm that an early growth may lead to: FP16 ends at 2^16."""

_LONGEST_WAIT = 2**53


class _Arithmetic(NamedTuple):
    """The few operations that tensors and Python's numbers write differently."""

    where: Callable[[Any, Any, Any], Any]
    clamp: Callable[[Any, float, float], Any]
    single: Callable[[Any], Any]
    """Rounds to FP32."""


_ON_TENSORS = _Arithmetic(torch.where, torch.clamp, torch.Tensor.float)
_ON_NUMBERS = _Arithmetic(
    lambda condition, yes, no: yes if condition else no,
    lambda value, low, high: min(max(value, low), high),
    np.float32,
)


class LossScale:
    """The scale S and its counters.

    Its counters are, in order: good steps in a row, hysteresis left, steps since the last growth, whether
    that growth was refuted, underflowed steps in a row.

    Attributes:
        config: its rule's settings.
        active: whether losses are scaled; where not, S is 1 and nothing moves.
        least: min_scale as FP32 holds it, which S never falls below.
        scale: S of the current step, float32, 0-d.
        inverse: 1/S, computed in float64 as torch's GradScaler does, float32, 0-d.
    """

    def __init__(self, config: MixedPrecisionConfig, device: torch.device, *, active: bool) -> None:
        self.config = config
        self._dynamic = config.dynamic_loss_scaling
        self.least = float(np.float32(config.min_scale))
        self._refuted_wait = float(
            max(
                config.scale_window,
                min(math.ceil(config.hysteresis / config.overflow_threshold), _LONGEST_WAIT),
            )
        )
        self.scale = torch.ones((), dtype=torch.float32, device=device)
        self.inverse = torch.ones((), dtype=torch.float32, device=device)
        self._counters = torch.zeros(5, dtype=torch.float64, device=device)
        self._of_counters = self._counters.unbind()
        self._never = torch.zeros((), dtype=torch.bool, device=device)
        if device.type == "cpu":
            self._seen_scale, self._seen_inverse = self.scale.numpy(), self.inverse.numpy()
            self._seen_counters = self._counters.numpy()
        self.active = False
        self.switch(active=active)

    def switch(self, *, active: bool) -> None:
        """Start scaling at initial_scale with fresh counters, or stop scaling: S = 1."""
        self.active = active
        self._set_scale(self.config.initial_scale if active else 1.0)
        fresh = [0.0, float(self.config.hysteresis), float(_LONGEST_WAIT), 0.0, 0.0]
        self._counters.copy_(torch.tensor(fresh, dtype=torch.float64))

    def update(self, *, grad_bad: Tensor, loss_bad: Tensor, underflow: Tensor, grad_norm: Tensor) -> Tensor:
        """Move the scale at the end of a step.

        Args:
            grad_bad: a gradient is not finite.
            loss_bad: the loss is not finite.
            underflow: both are, and the step's underflow estimate is above the threshold.
            grad_norm: L2 norm of the unscaled gradients.
            All are 0-d tensors on the device, the first three bool.

        Returns:
            Whether the gradients ask for a growth that max_scale forbids (bool, 0-d).
        """
        if not self.active or not self._dynamic:
            return self._never
        exhausted: Tensor
        target, counters, exhausted = self._moved(
            _ON_TENSORS, self.scale.double(), self._of_counters, grad_bad, loss_bad, underflow, grad_norm
        )
        torch.stack(counters, out=self._counters)
        self.scale.copy_(target)
        self.inverse.copy_(target.double().reciprocal())
        return exhausted

    @property
    def value(self) -> float:
        """S, as the host sees it in its own memory: on a CPU alone."""
        return float(self._seen_scale)

    def update_seen(self, *, grad_bad: bool, loss_bad: bool, underflow: bool, grad_norm: float) -> bool:
        """As `update`, by the host in its own memory: on a CPU alone, and to the same bits."""
        if not self.active or not self._dynamic:
            return False
        target, counters, exhausted = self._moved(
            _ON_NUMBERS,
            self.value,
            self._seen_counters.tolist(),
            grad_bad,
            loss_bad,
            underflow,
            grad_norm,
        )
        self._seen_counters[:] = counters
        self._seen_scale[()] = target
        self._seen_inverse[()] = 1.0 / float(target)
        return bool(exhausted)

    def _moved(
        self,
        on: _Arithmetic,
        scale: Any,
        counters: Any,
        grad_bad: Any,
        loss_bad: Any,
        underflow: Any,
        grad_norm: Any,
    ) -> tuple[Any, tuple[Any, ...], Any]:
        """The scale and the counters after a step, and whether max_scale forbade a growth.

        All numbers are 0-d tensors, or Python's own; `^ True` is a negation that both know.
        """
        config = self.config
        good, hysteresis, since_growth, refuted, underflowed = counters
        # Non-finite gradients of the kind that a smaller scale cures. Against min_scale as S can hold it:
        # one that FP32 rounds up would never seem to be reached.
        overflow = grad_bad & (loss_bad ^ True) & (scale > self.least)
        found = grad_bad | loss_bad
        hysteresis = hysteresis - overflow * 1.0
        back = overflow & (hysteresis <= 0)
        good = (good + 1.0) * (found ^ True)
        wait = config.scale_window + refuted * (self._refuted_wait - config.scale_window)
        up = good >= wait
        underflowed = (underflowed + 1.0) * underflow
        grown = scale * config.scale_factor
        early = False
        if config.underflow_handling:
            early = (
                (underflowed >= EARLY_GROWTH_RUN) & (refuted == 0) & (grown * grad_norm <= EARLY_GROWTH_ROOM)
            )
            up = up | early
        # S/f and not S*(1/f): for a factor that is no power of two they round differently. In float64, as
        # torch's own update, then rounded once.
        target = on.where(back, scale / config.scale_factor, on.where(up, grown, scale))
        target = on.single(on.clamp(target, config.min_scale, config.max_scale))
        grew = up & (target > scale)
        since_growth = since_growth + 1.0
        refuted = ((refuted > 0) | (overflow & (since_growth <= config.scale_window))) & (grew ^ True)
        counting = (back | up) ^ True
        after = (
            good * counting,
            on.where(back | grew, float(config.hysteresis), hysteresis),
            since_growth * (grew ^ True),
            refuted * 1.0,
            underflowed * counting,
        )
        return target, after, early & (grew ^ True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs."""
        return {"active": self.active, "scale": self.scale.clone(), "counters": self._counters.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.active = bool(state["active"])
        self.scale.copy_(state["scale"])
        self.inverse.copy_(self.scale.double().reciprocal())
        self._counters.copy_(state["counters"])

    def _set_scale(self, value: float) -> None:
        self.scale.fill_(value)
        self.inverse.fill_(1.0 / value)
