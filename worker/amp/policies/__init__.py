"""One precision policy per file; which one a configuration means is decided here alone."""

import torch

from service.contract.precision import (
    SUPPORTED_MODES,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    ResolvedPrecision,
)
from worker.amp.errors import SetupError
from worker.amp.policies.automatic import AutomaticPolicy
from worker.amp.policies.gradient_scaling import GradientScalingPolicy
from worker.amp.policies.interface import PrecisionPolicy

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

__all__ = ["DTYPES", "PrecisionPolicy", "build_policy"]


def build_policy(
    config: MixedPrecisionConfig, resolved: ResolvedPrecision, device: torch.device
) -> PrecisionPolicy:
    """The policy that `config` means on `device`."""
    if not config.enabled:
        return PrecisionPolicy()
    if config.mode not in SUPPORTED_MODES:
        raise SetupError(
            f"mode: '{config.mode.value}' is not available; use one of {sorted(SUPPORTED_MODES)}"
        )
    dtype = DTYPES[resolved.low_dtype]
    if config.mode is MixedPrecisionMode.GRADIENT_SCALING:
        return GradientScalingPolicy(scales=resolved.scaling)
    if dtype is torch.float32:
        return PrecisionPolicy()
    return AutomaticPolicy(device.type, dtype, scales=resolved.scaling)
