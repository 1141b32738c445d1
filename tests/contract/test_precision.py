"""The configuration's ranges, its rules between fields, and what it means on a device."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from halfstep.service.contract.precision import (
    DeviceCapability,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    PrecisionLevel,
    UnsupportedPrecisionError,
    resolve,
)

CPU = DeviceCapability(device_type="cpu", bf16=True, name="cpu")
GPU = DeviceCapability(device_type="cuda", bf16=True, name="new")
OLD_GPU = DeviceCapability(device_type="cuda", bf16=False, name="old")


class Envelope(BaseModel):
    precision: MixedPrecisionConfig


def refusals(**fields: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        MixedPrecisionConfig(**fields)
    with pytest.raises(ValidationError) as nested:
        Envelope.model_validate({"precision": fields})
    assert [error["loc"] for error in nested.value.errors()] == [
        ("precision", *error["loc"]) for error in caught.value.errors()
    ]
    return {str(error["loc"][0]): error["msg"] for error in caught.value.errors()}


def test_defaults() -> None:
    assert json.loads(MixedPrecisionConfig().model_dump_json()) == {
        "enabled": True,
        "mode": "automatic",
        "precision_level": "mixed",
        "loss_scaling": True,
        "gradient_scaling": True,
        "dynamic_loss_scaling": True,
        "initial_scale": 65536.0,
        "scale_factor": 2.0,
        "scale_window": 2000,
        "min_scale": 1.0,
        "max_scale": 16777216.0,
        "hysteresis": 1,
        "max_consecutive_skips": 25,
        "max_grad_norm": 1.0,
        "overflow_threshold": 1e-4,
        "underflow_threshold": 1e-6,
        "overflow_handling": True,
        "underflow_handling": True,
        "nan_handling": True,
        "adaptive_threshold": 0.1,
        "memory_efficiency": True,
        "activation_checkpointing": False,
        "performance_monitoring": True,
        "selective_layers": [],
        "fp32_layers": [],
        "allow_emulated_bf16": False,
        "logging_frequency": 10,
    }
    assert all(field.description for field in MixedPrecisionConfig.model_fields.values())


def test_it_survives_json_and_cannot_be_changed() -> None:
    config = MixedPrecisionConfig(mode="selective", selective_layers=["conv1", "re:fc."], max_grad_norm=None)
    assert MixedPrecisionConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.initial_scale = 2.0  # type: ignore[misc]  # that it is refused is what is tested


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", 1),
        ("enabled", "true"),
        ("loss_scaling", 0),
        ("initial_scale", "65536"),
        ("initial_scale", True),
        ("initial_scale", 0.0),
        ("initial_scale", -1.0),
        ("initial_scale", float("nan")),
        ("initial_scale", float("inf")),
        ("initial_scale", 10**400),
        ("scale_factor", 1.0),
        ("scale_factor", float("inf")),
        ("scale_window", 0),
        ("scale_window", 2.0),
        ("scale_window", True),
        ("scale_window", 2**40),
        ("min_scale", 0.0),
        ("max_scale", 2.0**128),
        ("hysteresis", 0),
        ("max_consecutive_skips", 0),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("nan")),
        ("overflow_threshold", 0.0),
        ("overflow_threshold", 1.0),
        ("underflow_threshold", 1.0),
        ("adaptive_threshold", -0.1),
        ("adaptive_threshold", 1.1),
        ("logging_frequency", 0),
        ("mode", "Automatic"),
        ("mode", "none"),
        ("precision_level", "fp8"),
        ("selective_layers", "conv1"),
        ("selective_layers", [1]),
        ("selective_layers", [""]),
        ("surprise", 1),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_ranges_hold_whether_enabled_or_not(field: str, value: Any, enabled: bool) -> None:
    (location,) = set(refusals(**{"enabled": enabled, field: value}))
    assert location == field


def test_integers_are_numbers() -> None:
    config = MixedPrecisionConfig(initial_scale=2**16, adaptive_threshold=1, min_scale=1, max_grad_norm=5)
    assert isinstance(config.initial_scale, float)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"initial_scale": 2.0**30}, {"initial_scale": "max_scale"}),
        ({"initial_scale": 0.5}, {"initial_scale": "min_scale"}),
        ({"min_scale": 8.0, "max_scale": 4.0}, {"min_scale": "lower min_scale or raise max_scale"}),
        ({"gradient_scaling": False, "precision_level": "fp16"}, {"gradient_scaling": "both or neither"}),
        ({"gradient_scaling": False}, {"gradient_scaling": "both or neither"}),
        ({"gradient_scaling": False, "precision_level": "dynamic"}, {"gradient_scaling": "both or neither"}),
        (
            {"gradient_scaling": False, "precision_level": "fp32", "mode": "gradient_scaling"},
            {"gradient_scaling": "both or neither"},
        ),
        ({"mode": "selective"}, {"selective_layers": "at least one layer"}),
        ({"mode": "manual", "precision_level": "dynamic"}, {"precision_level": "'bf16'"}),
        (
            {"mode": "selective", "precision_level": "fp32", "selective_layers": ["a"]},
            {"precision_level": "nothing"},
        ),
        ({"mode": "adaptive", "precision_level": "fp32"}, {"precision_level": "nothing to adapt to"}),
        ({"mode": "gradient_scaling"}, {"precision_level": "'fp32'"}),
        ({"mode": "gradient_scaling", "precision_level": "fp16"}, {"precision_level": "'automatic'"}),
        ({"mode": "gradient_scaling", "precision_level": "bf16"}, {"precision_level": "'automatic'"}),
        ({"mode": "gradient_scaling", "precision_level": "dynamic"}, {"precision_level": "'automatic'"}),
        (
            {"mode": "selective", "initial_scale": 2.0**30, "gradient_scaling": False},
            {"initial_scale": "", "selective_layers": "", "gradient_scaling": ""},
        ),
    ],
)
def test_contradictions_name_their_field_and_the_remedy(
    fields: dict[str, Any], expected: dict[str, str]
) -> None:
    found = refusals(**fields)
    assert found.keys() == expected.keys()
    for field, part in expected.items():
        assert part in found[field]
    MixedPrecisionConfig(**fields, enabled=False)


@pytest.mark.parametrize("level", ["bf16", "fp32"])
def test_unscaled_levels_do_not_mind_the_scaling_flags(level: str) -> None:
    MixedPrecisionConfig(precision_level=level, gradient_scaling=False)


REFUSED = {
    ("manual", "dynamic"),
    ("selective", "fp32"),
    ("adaptive", "fp32"),
    ("gradient_scaling", "fp16"),
    ("gradient_scaling", "bf16"),
    ("gradient_scaling", "mixed"),
    ("gradient_scaling", "dynamic"),
}


@pytest.mark.parametrize("mode", [mode.value for mode in MixedPrecisionMode])
@pytest.mark.parametrize("level", [level.value for level in PrecisionLevel])
@pytest.mark.parametrize("capability", [CPU, GPU, OLD_GPU], ids=lambda c: c.name)
def test_every_cell(mode: str, level: str, capability: DeviceCapability) -> None:
    fields: dict[str, Any] = {"mode": mode, "precision_level": level}
    if mode == "selective":
        fields["selective_layers"] = ["layer"]
    if (mode, level) in REFUSED:
        assert "precision_level" in refusals(**fields)
        return
    config = MixedPrecisionConfig(**fields)
    if level == "bf16" and not capability.bf16:
        with pytest.raises(UnsupportedPrecisionError, match="allow_emulated_bf16") as caught:
            resolve(config, capability)
        assert caught.value.field == "precision_level"
        emulated = resolve(config.model_copy(update={"allow_emulated_bf16": True}), capability)
        assert emulated.low_dtype == "bfloat16"
        assert any("emulates" in warning for warning in emulated.warnings)
        return
    resolved = resolve(config, capability)
    low = {
        "fp32": "float32",
        "fp16": "float16",
        "bf16": "bfloat16",
        "mixed": "float16" if capability.device_type == "cuda" else "bfloat16",
        "dynamic": "bfloat16" if capability.bf16 else "float16",
    }[level]
    assert resolved.low_dtype == low
    assert resolved.scaling is (low == "float16" or mode == "gradient_scaling")
    assert resolved.initial_scale == (2.0**16 if resolved.scaling else 1.0)
    warnings = " ".join(resolved.warnings)
    assert ("nothing is cast" in warnings) is (low == "float32" and mode != "gradient_scaling")
    assert ("slow" in warnings) is (low == "float16" and capability.device_type == "cpu")
    assert ("ignored under BF16" in warnings) is (low == "bfloat16")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"precision_level": "fp16", "loss_scaling": False}, "loses small gradients"),
        (
            {"precision_level": "fp16", "loss_scaling": False, "gradient_scaling": False},
            "loses small gradients",
        ),
        ({"precision_level": "fp16", "initial_scale": 1000.0}, "initial_scale: 1000 is not a power of two"),
        ({"precision_level": "fp16", "scale_factor": 1.5}, "scale_factor: 1.5 is not a power of two"),
        ({"selective_layers": ["a"]}, "selective_layers: ignored"),
        ({"fp32_layers": ["a"], "precision_level": "fp32"}, "fp32_layers: ignored"),
    ],
)
def test_warnings(fields: dict[str, Any], part: str) -> None:
    resolved = resolve(MixedPrecisionConfig(**fields), GPU)
    assert sum(part in warning for warning in resolved.warnings) == 1
    if "loss_scaling" in fields:
        assert (resolved.scaling, resolved.initial_scale) == (False, 1.0)


def test_fp16_needs_a_device_that_has_it() -> None:
    lame = DeviceCapability(device_type="cpu", bf16=True, fp16=False)
    with pytest.raises(UnsupportedPrecisionError, match="use 'bf16' or 'fp32'"):
        resolve(MixedPrecisionConfig(precision_level="fp16"), lame)


def test_disabled_is_plain_fp32_on_every_device() -> None:
    config = MixedPrecisionConfig(enabled=False, precision_level="bf16", mode="selective")
    resolved = resolve(config, OLD_GPU)
    assert (resolved.low_dtype, resolved.scaling, resolved.warnings) == ("float32", False, ())
