"""What a mixed-precision configuration may say, and what it means on a given device.

Here live the fields, their ranges, the rules between fields and the mode x level table, shared by the API
(which has no torch) and the engine. No tensor, device probe or training step belongs here: the caller
describes the device with `DeviceCapability`.
"""

import math
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

ComputeDtype = Literal["float32", "float16", "bfloat16"]
"""What a step computes in; under a mixed precision, the lower of its two types."""


class MixedPrecisionMode(StrEnum):
    """How low precision enters the step."""

    AUTOMATIC = "automatic"
    MANUAL = "manual"
    SELECTIVE = "selective"
    ADAPTIVE = "adaptive"
    GRADIENT_SCALING = "gradient_scaling"


class PrecisionLevel(StrEnum):
    """Which low precision is meant."""

    FP16 = "fp16"
    FP32 = "fp32"
    BF16 = "bf16"
    DYNAMIC = "dynamic"
    MIXED = "mixed"


SUPPORTED_MODES: frozenset[MixedPrecisionMode] = frozenset(MixedPrecisionMode)
"""Modes the engine runs; a service refuses the others when a job is submitted."""

REFUSED_CELLS: dict[tuple[MixedPrecisionMode, PrecisionLevel], str] = {
    (MixedPrecisionMode.MANUAL, PrecisionLevel.DYNAMIC): (
        "mode 'manual' stores the weights in precision_level, and a storage type cannot change in a run: "
        "use 'fp16', 'bf16' or 'mixed'"
    ),
    (MixedPrecisionMode.SELECTIVE, PrecisionLevel.FP32): (
        "mode 'selective' with precision_level 'fp32' would lower nothing: use 'fp16', 'bf16', 'mixed' or "
        "'dynamic', or mode 'automatic' for plain FP32"
    ),
    (MixedPrecisionMode.ADAPTIVE, PrecisionLevel.FP32): (
        "mode 'adaptive' with precision_level 'fp32' has nothing to adapt to: use 'dynamic', 'mixed', 'fp16' "
        "or 'bf16', or mode 'automatic' for plain FP32"
    ),
} | {
    (MixedPrecisionMode.GRADIENT_SCALING, level): (
        f"mode 'gradient_scaling' scales the loss and casts nothing, so precision_level '{level.value}' has "
        f"no meaning in it: use precision_level 'fp32', or mode 'automatic' to compute in '{level.value}'"
    )
    for level in (PrecisionLevel.FP16, PrecisionLevel.BF16, PrecisionLevel.MIXED, PrecisionLevel.DYNAMIC)
}
"""The cells of mode x level that mean nothing, each with the reason and the remedy."""

_COUNTER_LIMIT = 2**31 - 1
_LARGEST_SCALE = 2.0**127
_SMALLEST_SCALE = 2.0**-126
"""The smallest normal FP32 number: below it a scale and its reciprocal lose bits."""

Flag = Annotated[bool, Strict()]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Scale = Annotated[Real, Field(ge=_SMALLEST_SCALE, le=_LARGEST_SCALE)]
Share = Annotated[Real, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Strict(), Field(ge=1, le=_COUNTER_LIMIT)]
LayerPattern = Annotated[str, Strict(), Field(min_length=1, max_length=500)]
LayerPatterns = Annotated[tuple[LayerPattern, ...], Field(max_length=1000)]


class MixedPrecisionConfig(BaseModel):
    """One frozen description of how a model is trained in mixed precision.

    Every argument is by keyword. Booleans and numbers are strict: no string is a number, no boolean is one,
    and an integer is accepted where a real number is asked for. A contradiction raises
    `pydantic.ValidationError`, each error located at its field, with the remedy in its message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: Flag = Field(
        default=True,
        description="False: a plain FP32 step, scale 1.0, nothing skipped; clipping, monitoring and logging "
        "still apply.",
    )
    mode: MixedPrecisionMode = Field(
        default=MixedPrecisionMode.AUTOMATIC, description="How low precision enters the step."
    )
    precision_level: PrecisionLevel = Field(
        default=PrecisionLevel.MIXED,
        description="The low precision; 'mixed' is float16 on CUDA and bfloat16 on a CPU, 'dynamic' is "
        "bfloat16 "
        "where the device has it natively, else float16.",
    )
    loss_scaling: Flag = Field(
        default=True, description="Multiply the loss by the scale before the backward pass."
    )
    gradient_scaling: Flag = Field(
        default=True, description="Divide the gradients by the scale before clipping and the update."
    )
    dynamic_loss_scaling: Flag = Field(
        default=True,
        description="Let the scale grow and back off. False: it stays initial_scale; non-finite steps are "
        "still skipped.",
    )
    initial_scale: Scale = Field(
        default=2.0**16,
        description="The scale at the start, and again on entering FP16. A power of two is exact.",
    )
    scale_factor: Annotated[Real, Field(gt=1.0)] = Field(
        default=2.0, description="The scale is multiplied by it to grow and divided by it to back off."
    )
    scale_window: Count = Field(default=2000, description="Applied steps in a row before a growth is tried.")
    min_scale: Scale = Field(default=1.0, description="The scale never falls below it.")
    max_scale: Scale = Field(default=2.0**24, description="The scale never rises above it.")
    hysteresis: Count = Field(
        default=1, description="Overflow steps tolerated before a back-off; 1 is torch's rule."
    )
    max_consecutive_skips: Count = Field(
        default=25, description="So many skipped steps in a row end the run with TooManySkips."
    )
    max_grad_norm: Annotated[Real, Field(gt=0.0)] | None = Field(
        default=1.0,
        description="Clip the unscaled gradients to this L2 norm; null: no clipping, the norm is still "
        "measured.",
    )
    overflow_threshold: Share = Field(
        default=1e-4,
        description="The largest acceptable long-run share of steps lost to overflow: after a growth that "
        "overflowed within scale_window steps, the next one waits hysteresis/overflow_threshold steps.",
    )
    underflow_threshold: Share = Field(
        default=1e-6, description="The largest acceptable underflow estimate of an applied step."
    )
    overflow_handling: Flag = Field(
        default=True,
        description="Skip an overflowed step and follow the scale policy. False: skip it, and raise "
        "NonFiniteGradient "
        "at the next decision step.",
    )
    underflow_handling: Flag = Field(
        default=True,
        description="Grow the scale early after 32 underflowed steps in a row. False: only measure.",
    )
    nan_handling: Flag = Field(
        default=True,
        description="Skip a step with NaN, restore the buffers, leave the scale. False: skip it, and raise "
        "NonFiniteLoss or NonFiniteGradient at the next decision step.",
    )
    adaptive_threshold: Annotated[Real, Field(ge=0.0, le=1.0)] = Field(
        default=0.1,
        description="ADAPTIVE: the share of the device's memory that a full-precision step may peak at.",
    )
    memory_efficiency: Flag = Field(
        default=True,
        description="Free gradients between steps, and switch ADAPTIVE's memory rule on.",
    )
    activation_checkpointing: Flag = Field(
        default=False, description="Recompute activations in the backward pass instead of keeping them."
    )
    performance_monitoring: Flag = Field(
        default=True, description="Measure step time, samples per second, peak memory and host syncs."
    )
    selective_layers: LayerPatterns = Field(
        default=(),
        description="SELECTIVE: the subtrees in low precision, by exact module name, glob, or 're:' and a "
        "regular expression.",
    )
    fp32_layers: LayerPatterns = Field(
        default=(), description="Subtrees kept in FP32 in every mode, named as in selective_layers."
    )
    allow_emulated_bf16: Flag = Field(
        default=False, description="Allow BF16 on a GPU that only emulates it, which is slow."
    )
    logging_frequency: Count = Field(default=10, description="Steps between log lines.")

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        problems = list(self._contradictions()) if self.enabled else []
        if problems:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("precision_contradiction", "{reason}", {"reason": reason}),
                        loc=(field,),
                        input=getattr(self, field),
                    )
                    for field, reason in problems
                ],
            )
        return self

    def _contradictions(self) -> list[tuple[str, str]]:
        problems = []
        refusal = REFUSED_CELLS.get((self.mode, self.precision_level))
        if refusal is not None:
            problems.append(("precision_level", refusal))
        if self.min_scale > self.max_scale:
            reason = (
                f"min_scale {self.min_scale:g} is above max_scale {self.max_scale:g}: lower min_scale or "
                "raise max_scale"
            )
            problems.append(("min_scale", reason))
        elif not self.min_scale <= self.initial_scale <= self.max_scale:
            reason = (
                f"initial_scale {self.initial_scale:g} is outside min_scale {self.min_scale:g} to max_scale "
                f"{self.max_scale:g}: choose it between them, or move min_scale or max_scale"
            )
            problems.append(("initial_scale", reason))
        if self._cell_can_scale and self.loss_scaling and not self.gradient_scaling:
            reason = (
                "gradient_scaling is false while loss_scaling is true: the gradients would keep the scale "
                "and the learning rate would silently be multiplied by it; set both or neither"
            )
            problems.append(("gradient_scaling", reason))
        if self.mode is MixedPrecisionMode.SELECTIVE and not self.selective_layers:
            reason = (
                "selective_layers is empty and mode 'selective' lowers nothing else: name at least one "
                "layer, or use mode 'automatic'"
            )
            problems.append(("selective_layers", reason))
        return problems

    @property
    def _cell_can_scale(self) -> bool:
        if self.mode is MixedPrecisionMode.GRADIENT_SCALING:
            return self.precision_level is PrecisionLevel.FP32
        return self.precision_level in {PrecisionLevel.FP16, PrecisionLevel.MIXED, PrecisionLevel.DYNAMIC}


class DeviceCapability(BaseModel):
    """What a device can compute in, as its owner probed it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_type: Literal["cpu", "cuda"]
    bf16: bool
    """BF16 is native: in hardware on a GPU; on a CPU, supported by torch."""
    fp16: bool = True
    name: str = ""


class ResolvedPrecision(BaseModel):
    """A configuration's meaning on one device.

    Attributes:
        low_dtype: the type that low-precision work uses; "float32" where nothing is lowered.
        scaling: whether the loss is scaled while low_dtype is in use.
        initial_scale: the scale of the first scaled step; 1.0 where nothing is scaled.
        warnings: what the user asked for and does not get, or gets at a price, a sentence each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low_dtype: ComputeDtype
    scaling: bool
    initial_scale: float
    warnings: tuple[str, ...] = ()


class UnsupportedPrecisionError(ValueError):
    """The device cannot compute what the configuration asks for.

    Attributes:
        field: the configuration field to change.
        reason: what is wrong and the remedy, in a sentence.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def resolve(config: MixedPrecisionConfig, capability: DeviceCapability) -> ResolvedPrecision:
    """Tell what `config` means on a device of `capability`.

    Raises:
        UnsupportedPrecisionError: the device lacks the precision; it is never silently replaced by FP32.
    """
    if not config.enabled:
        return ResolvedPrecision(low_dtype="float32", scaling=False, initial_scale=1.0)
    low_dtype = _low_dtype(config, capability)
    _require_support(config, capability, low_dtype)
    can_scale = low_dtype == "float16" or config.mode is MixedPrecisionMode.GRADIENT_SCALING
    scaling = can_scale and config.loss_scaling and config.gradient_scaling
    warnings = (
        *_dtype_warnings(config, capability, low_dtype),
        *_scaling_warnings(config, low_dtype, can_scale=can_scale, scaling=scaling),
        *_layer_warnings(config, low_dtype),
    )
    return ResolvedPrecision(
        low_dtype=low_dtype,
        scaling=scaling,
        initial_scale=config.initial_scale if scaling else 1.0,
        warnings=warnings,
    )


def _low_dtype(config: MixedPrecisionConfig, capability: DeviceCapability) -> ComputeDtype:
    match config.precision_level:
        case PrecisionLevel.FP32:
            return "float32"
        case PrecisionLevel.FP16:
            return "float16"
        case PrecisionLevel.BF16:
            return "bfloat16"
        case PrecisionLevel.MIXED:
            return "float16" if capability.device_type == "cuda" else "bfloat16"
        case PrecisionLevel.DYNAMIC:
            return "bfloat16" if capability.bf16 else "float16"


def _require_support(
    config: MixedPrecisionConfig, capability: DeviceCapability, low_dtype: ComputeDtype
) -> None:
    device = capability.name or capability.device_type
    if low_dtype == "bfloat16" and not capability.bf16:
        if capability.device_type == "cuda" and config.allow_emulated_bf16:
            return
        remedy = " or set allow_emulated_bf16" if capability.device_type == "cuda" else ""
        raise UnsupportedPrecisionError(
            "precision_level", f"'{device}' has no native BF16: use 'fp16' or 'mixed' on a GPU{remedy}"
        )
    if low_dtype == "float16" and not capability.fp16:
        raise UnsupportedPrecisionError(
            "precision_level", f"'{device}' cannot compute in FP16: use 'bf16' or 'fp32'"
        )


def _dtype_warnings(
    config: MixedPrecisionConfig, capability: DeviceCapability, low_dtype: ComputeDtype
) -> list[str]:
    warnings = []
    on_cpu = capability.device_type == "cpu"
    if low_dtype == "float32" and config.mode is not MixedPrecisionMode.GRADIENT_SCALING:
        warnings.append("precision_level: 'fp32' means that nothing is cast; this is a plain FP32 run")
    if low_dtype == "float16" and on_cpu:
        warnings.append(
            "precision_level: FP16 on a CPU is slow, convolutions above all; 'bf16' is faster there"
        )
    if config.precision_level is PrecisionLevel.MIXED and on_cpu:
        warnings.append("precision_level: 'mixed' is bfloat16 on a CPU, so the scale stays 1.0")
    if low_dtype == "bfloat16" and not capability.bf16:
        warnings.append(
            f"allow_emulated_bf16: '{capability.name or 'the device'}' emulates BF16, which is slow"
        )
    return warnings


def _scaling_warnings(
    config: MixedPrecisionConfig, low_dtype: ComputeDtype, *, can_scale: bool, scaling: bool
) -> list[str]:
    warnings = []
    if low_dtype == "bfloat16" and (config.loss_scaling or config.gradient_scaling):
        warnings.append(
            "loss_scaling, gradient_scaling: ignored under BF16, whose exponent range is FP32's; the scale "
            "stays 1.0"
        )
    if low_dtype == "float16" and not scaling:
        warnings.append(
            "loss_scaling: FP16 without a loss scale loses small gradients; set loss_scaling and "
            "gradient_scaling"
        )
    if can_scale and not scaling and config.mode is MixedPrecisionMode.GRADIENT_SCALING:
        warnings.append(
            "loss_scaling: mode 'gradient_scaling' without loss_scaling and gradient_scaling is a plain FP32 "
            "run"
        )
    if scaling:
        warnings.extend(
            f"{field}: {value:g} is not a power of two, so scaling and unscaling round the gradients"
            for field, value in (
                ("initial_scale", config.initial_scale),
                ("scale_factor", config.scale_factor),
            )
            if math.frexp(value)[0] != 0.5
        )
    return warnings


def _layer_warnings(config: MixedPrecisionConfig, low_dtype: ComputeDtype) -> list[str]:
    warnings = []
    if config.selective_layers and config.mode is not MixedPrecisionMode.SELECTIVE:
        warnings.append(
            f"selective_layers: ignored in mode '{config.mode.value}'; it belongs to mode 'selective'"
        )
    if config.fp32_layers and low_dtype == "float32":
        warnings.append("fp32_layers: ignored, since every layer is in FP32")
    return warnings
