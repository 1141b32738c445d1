"""Every error the engine raises on purpose.

    MixedPrecisionError
    ├── SetupError                 the model, optimizer or layers do not fit the configuration
    ├── StepError                  a call out of order, or a batch or loss that cannot be trained on
    ├── StateMismatchError         a saved state does not belong to this trainer
    └── NonFiniteError             training met values no policy could cure
        ├── NonFiniteGradient      gradients, with their handling switched off
        ├── NonFiniteLoss          a loss, with its handling switched off
        └── TooManySkips           skipped step after skipped step

A contradiction in the configuration itself is pydantic's ValidationError; a precision that the device lacks
is `halfstep.service.contract.precision.UnsupportedPrecisionError`.
"""

from typing import Literal

Cause = Literal["non_finite_gradients", "non_finite_loss", "scale_exhausted"]
Verdict = Literal["precision", "data_or_model"]
"""Of a bad step that was repeated in FP32: "precision" where it is finite there."""


class MixedPrecisionError(Exception):
    """Something the engine refuses to do, or can no longer do."""


class SetupError(MixedPrecisionError, ValueError):
    """The model, optimizer or layers do not fit the configuration."""


class StepError(MixedPrecisionError, RuntimeError):
    """A call out of order, or a batch or loss that cannot be trained on."""


class StateMismatchError(MixedPrecisionError, ValueError):
    """A saved state does not belong to this trainer."""


class NonFiniteError(MixedPrecisionError, ArithmeticError):
    """Training met non-finite values that it may not, or can no longer, skip.

    Attributes:
        cause: what was not finite, or that the scale has no room left.
        layer: the module where the first non-finite value was seen; None where that is not known.
        step: the optimizer step at which it was seen, from 1.
        verdict: whether the precision is to blame; None where the step was not repeated in FP32.
    """

    def __init__(
        self, message: str, *, cause: Cause, layer: str | None, step: int, verdict: Verdict | None = None
    ) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.cause: Cause = cause
        self.layer = layer
        self.step = step


class NonFiniteGradient(NonFiniteError):
    """A gradient was not finite and its handling is switched off."""


class NonFiniteLoss(NonFiniteError):
    """The loss was not finite and nan_handling is switched off."""


class TooManySkips(NonFiniteError):
    """max_consecutive_skips steps in a row were skipped."""
