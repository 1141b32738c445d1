"""The loss scale and the rule by which it moves, as tensors on the device.

Everything here happens at the end of a step without a host read. Which steps are skipped is decided by the
caller; what the host concludes from many steps (budgets, alerts) is in `supervision`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from service.contract.precision import MixedPrecisionConfig

EARLY_GROWTH_RUN = 32
"""Underflowed steps in a row after which a growth is tried without waiting for the window."""

EARLY_GROWTH_ROOM = 2.0**14
"""The largest scaled gradient norm that an early growth may lead to: FP16 ends at 2^16."""

_LONGEST_WAIT = 2**53


class LossScale:
    """The scale S and its counters.

    Attributes:
        active: whether losses are scaled; where not, S is 1 and nothing moves.
        scale: S of the current step, float32, 0-d.
        inverse: 1/S, computed in float64 as torch's GradScaler does, float32, 0-d.
    """

    def __init__(self, config: MixedPrecisionConfig, device: torch.device, *, active: bool) -> None:
        self._config = config
        self._dynamic = config.dynamic_loss_scaling
        self._refuted_wait = float(
            max(
                config.scale_window,
                min(math.ceil(config.hysteresis / config.overflow_threshold), _LONGEST_WAIT),
            )
        )
        self.scale = torch.ones((), dtype=torch.float32, device=device)
        self.inverse = torch.ones((), dtype=torch.float32, device=device)
        self._counters = torch.zeros(5, dtype=torch.float64, device=device)
        self._good, self._hysteresis, self._since_growth, self._refuted, self._underflowed = (
            self._counters.unbind()
        )
        self._full_hysteresis = torch.full((), float(config.hysteresis), dtype=torch.float64, device=device)
        self._never = torch.zeros((), dtype=torch.bool, device=device)
        self.active = False
        self.switch(active=active)

    def switch(self, *, active: bool) -> None:
        """Start scaling at initial_scale with fresh counters, or stop scaling: S = 1."""
        self.active = active
        self._set_scale(self._config.initial_scale if active else 1.0)
        fresh = [0.0, float(self._config.hysteresis), float(_LONGEST_WAIT), 0.0, 0.0]
        self._counters.copy_(torch.tensor(fresh, dtype=torch.float64))

    def overflow(self, grad_bad: Tensor, loss_bad: Tensor) -> Tensor:
        """Whether this step's non-finite gradients are of the kind that a smaller scale cures (bool, 0-d)."""
        if not self.active:
            return self._never
        return grad_bad & ~loss_bad & (self.scale > self._config.min_scale)

    def update(self, *, overflow: Tensor, found: Tensor, underflow: Tensor, grad_norm: Tensor) -> Tensor:
        """Move the scale at the end of a step.

        Args:
            overflow: as returned by `overflow` for this step.
            found: the step was skipped.
            underflow: the step was applied and its underflow estimate is above the threshold.
            grad_norm: L2 norm of the unscaled gradients.
            All are 0-d tensors on the device, the first three bool.

        Returns:
            Whether the gradients ask for a growth that max_scale forbids (bool, 0-d).
        """
        if not self.active or not self._dynamic:
            return self._never
        config = self._config
        scale = self.scale.double()
        refuted = self._refuted > 0
        hysteresis = self._hysteresis - overflow.double()
        back = overflow & (hysteresis <= 0)
        good = (self._good + 1.0) * ~found
        wait = config.scale_window + self._refuted * (self._refuted_wait - config.scale_window)
        up = good >= wait
        underflowed = (self._underflowed + 1.0) * underflow
        grown = scale * config.scale_factor
        early = self._never
        if config.underflow_handling:
            early = (underflowed >= EARLY_GROWTH_RUN) & ~refuted & (grown * grad_norm <= EARLY_GROWTH_ROOM)
            up = up | early
        # S/f and not S*(1/f): for a factor that is no power of two they round differently. In float64, as
        # torch's own update, then rounded once.
        target = torch.where(back, scale / config.scale_factor, torch.where(up, grown, scale))
        target = target.clamp(config.min_scale, config.max_scale).float()
        grew = up & (target > self.scale)
        since_growth = self._since_growth + 1.0
        refuted = (refuted | (overflow & (since_growth <= config.scale_window))) & ~grew
        counting = ~(back | up)
        torch.stack(
            (
                good * counting,
                torch.where(back | grew, self._full_hysteresis, hysteresis),
                since_growth * ~grew,
                refuted.double(),
                underflowed * counting,
            ),
            out=self._counters,
        )
        self.scale.copy_(target)
        self.inverse.copy_(target.double().reciprocal())
        return early & ~grew

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
