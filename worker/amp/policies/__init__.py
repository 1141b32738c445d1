"""One precision policy per file; which one a configuration means is decided here alone."""

import torch

from halfstep.service.contract.precision import (
    SUPPORTED_MODES,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    PrecisionLevel,
    ResolvedPrecision,
)
from halfstep.worker.amp.errors import SetupError
from halfstep.worker.amp.policies.automatic import AutomaticPolicy
from halfstep.worker.amp.policies.gradient_scaling import GradientScalingPolicy
from halfstep.worker.amp.policies.interface import PrecisionPolicy, Transition
from halfstep.worker.amp.policies.manual import ManualPolicy
from halfstep.worker.amp.policies.selective import SelectivePolicy
from halfstep.worker.amp.policies.switching import SwitchingPolicy
from halfstep.worker.amp.record.memory import MemoryMonitor

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

__all__ = ["DTYPES", "PrecisionPolicy", "Transition", "build_policy"]


def build_policy(
    config: MixedPrecisionConfig,
    resolved: ResolvedPrecision,
    device: torch.device,
    memory: MemoryMonitor,
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
    low: PrecisionPolicy
    if config.mode is MixedPrecisionMode.MANUAL:
        return ManualPolicy(device.type, dtype, scales=resolved.scaling, fp32_layers=config.fp32_layers)
    if config.mode is MixedPrecisionMode.SELECTIVE:
        low = SelectivePolicy(
            device.type,
            dtype,
            scales=resolved.scaling,
            selective_layers=config.selective_layers,
            fp32_layers=config.fp32_layers,
        )
    else:
        low = AutomaticPolicy(device.type, dtype, scales=resolved.scaling, fp32_layers=config.fp32_layers)
    if config.mode is MixedPrecisionMode.ADAPTIVE:
        return SwitchingPolicy(config, low, memory_rule=config.memory_efficiency, memory=memory)
    if config.precision_level is PrecisionLevel.DYNAMIC:
        return SwitchingPolicy(config, low, memory_rule=False, memory=memory)
    return low
