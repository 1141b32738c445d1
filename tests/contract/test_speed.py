"""When a precision is called slow, by which figure, and what is advised instead."""

from typing import Any

import pytest

from halfstep.service.contract.precision import DeviceCapability, MixedPrecisionConfig, resolve
from halfstep.service.contract.speed import DtypeSpeed, SlowPrecision, slow_precision

CPU = DeviceCapability(device_type="cpu", bf16=True, fp16=True, name="cpu")


def speeds(**relative: tuple[float, float]) -> dict[str, DtypeSpeed]:
    return {
        dtype: DtypeSpeed(matmul=matmul, convolution=convolution, matmul_gflops=1.0, convolution_gflops=1.0)
        for dtype, (matmul, convolution) in relative.items()
    }


OLD = speeds(float32=(1.0, 1.0), bfloat16=(0.5, 0.8), float16=(0.02, 0.01))
NEW = speeds(float32=(1.0, 1.0), bfloat16=(2.0, 0.9), float16=(0.02, 0.01))


def told(
    config: dict[str, Any], measured: dict[str, DtypeSpeed], *, convolutional: bool = False
) -> SlowPrecision | None:
    precision = MixedPrecisionConfig(**config)
    dtype = resolve(precision, CPU).low_dtype
    return slow_precision(precision, dtype, measured, convolutional=convolutional)


def test_a_slow_precision_has_its_figure_and_a_remedy() -> None:
    found = told({}, OLD)
    assert found is not None
    assert (found.dtype, found.relative) == ("bfloat16", 0.5)
    sentence = found.sentence("host-1's CPU")
    assert "on host-1's CPU matrix products in bfloat16 run at 0.5 times float32's speed" in sentence
    assert "precision_level 'fp32' trains faster there" in sentence


def test_a_faster_low_precision_is_the_first_remedy() -> None:
    found = told({"precision_level": "fp16"}, NEW)
    assert found is not None
    assert "precision_level 'bf16' trains faster there, at 2 times" in found.remedy


def test_convolutions_go_by_their_own_figure() -> None:
    assert told({}, NEW) is None
    found = told({}, NEW, convolutional=True)
    assert found is not None
    assert (found.relative, found.work) == (0.9, "convolutions")
    assert "'fp32'" in found.remedy


@pytest.mark.parametrize(
    "config",
    [
        {"precision_level": "fp32"},
        {"enabled": False},
        {"mode": "gradient_scaling", "precision_level": "fp32"},
    ],
)
def test_what_lowers_nothing_is_not_slow(config: dict[str, Any]) -> None:
    assert told(config, OLD) is None


def test_what_was_not_measured_is_not_slow() -> None:
    assert told({}, {}) is None
    assert told({}, speeds(float32=(1.0, 1.0))) is None
    assert told({}, speeds(float32=(1.0, 1.0), bfloat16=(1.0, 1.0))) is None


@pytest.mark.parametrize("mode", ["selective", "adaptive"])
def test_the_remedy_is_a_configuration_that_is_accepted(mode: str) -> None:
    found = told({"mode": mode, "precision_level": "bf16", "selective_layers": ["fc1"]}, OLD)
    assert found is not None
    assert "mode 'automatic' with precision_level 'fp32'" in found.remedy
