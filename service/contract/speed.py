"""How fast a device computes in each precision, as its worker measured it, and what that says of a job.

Shared by the worker, which measures, and the API, which warns before a job is stored. Nothing is measured
here, and no table of devices belongs here: what nobody measured is not warned of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from halfstep.service.contract.precision import (
    REFUSED_CELLS,
    ComputeDtype,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    PrecisionLevel,
)

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class DtypeSpeed(BaseModel):
    """One data type's speed: over float32's on the same device, and in billions of operations a second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul: Positive = Field(description="Speed of a matrix product over float32's.")
    convolution: Positive = Field(
        description="Speed of a convolution over float32's, its backward pass included."
    )
    matmul_gflops: Positive = Field(description="10^9 operations per second in a matrix product.")
    convolution_gflops: Positive = Field(description="10^9 operations per second in a convolution.")


Speeds = Mapping[str, DtypeSpeed]
"""By data type: float32, float16, bfloat16, and tf32 where a GPU has it."""

_LEVELS: Mapping[PrecisionLevel, ComputeDtype] = {
    PrecisionLevel.BF16: "bfloat16",
    PrecisionLevel.FP16: "float16",
}


@dataclass(frozen=True, slots=True)
class SlowPrecision:
    """A precision that costs time on a device instead of saving it.

    Attributes:
        dtype: the low precision.
        relative: its speed over float32's; below 1.
        work: what was measured, in a person's words.
        remedy: what to ask for instead.
    """

    dtype: ComputeDtype
    relative: float
    work: str
    remedy: str

    def sentence(self, device: str) -> str:
        """What a person should read; `device` is who measured it."""
        return (
            f"precision_level: on {device} {self.work} in {self.dtype} run at {self.relative:.2g} times "
            f"float32's speed, as measured there: {self.remedy}"
        )


def slow_precision(
    config: MixedPrecisionConfig, dtype: ComputeDtype, speeds: Speeds, *, convolutional: bool
) -> SlowPrecision | None:
    """What `config`, whose low precision is `dtype` on a device of these speeds, costs there.

    Args:
        config: the precision asked for.
        dtype: what `resolve` says that it means on the device.
        speeds: the device's own; empty where it has not measured.
        convolutional: the model's time goes into convolutions.

    Returns:
        None where it is no slower than float32, nothing is lowered, or nothing is known.
    """
    if dtype == "float32" or dtype not in speeds:
        return None
    relative = _relative(speeds[dtype], convolutional=convolutional)
    if relative >= 1:
        return None
    work = "convolutions" if convolutional else "matrix products"
    return SlowPrecision(dtype, relative, work, _remedy(config, speeds, convolutional=convolutional))


def _relative(speed: DtypeSpeed, *, convolutional: bool) -> float:
    return speed.convolution if convolutional else speed.matmul


def _remedy(config: MixedPrecisionConfig, speeds: Speeds, *, convolutional: bool) -> str:
    gains = {
        level: _relative(speeds[dtype], convolutional=convolutional)
        for level, dtype in _LEVELS.items()
        if dtype in speeds
    }
    best = max(gains, key=lambda level: gains[level], default=None)
    if best is not None and gains[best] > 1:
        return f"precision_level '{best.value}' trains faster there, at {gains[best]:.2g} times"
    plain = f"precision_level '{PrecisionLevel.FP32.value}'"
    if (config.mode, PrecisionLevel.FP32) in REFUSED_CELLS:
        plain = f"mode '{MixedPrecisionMode.AUTOMATIC.value}' with {plain}"
    return f"{plain} trains faster there, and a GPU is where the low precision pays"
