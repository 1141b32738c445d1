"""What is advised when a step is not finite, over every verdict, level, mode and precision in use."""

import itertools
import re
from typing import Any, get_args

import pytest

from halfstep.service.contract.precision import (
    REFUSED_CELLS,
    ComputeDtype,
    DeviceCapability,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    PrecisionLevel,
    UnsupportedPrecisionError,
    resolve,
)
from halfstep.worker.amp.diagnosis.advice import TABLE, Trouble, advice
from halfstep.worker.amp.errors import Cause, Verdict

VERDICTS: tuple[Verdict | None, ...] = (*get_args(Verdict), None)
CAUSES: tuple[Cause, ...] = get_args(Cause)
TROUBLES: tuple[Trouble, ...] = (*CAUSES, "range_exhausted")
CELLS = [cell for cell in itertools.product(MixedPrecisionMode, PrecisionLevel) if cell not in REFUSED_CELLS]
DEVICES = [
    DeviceCapability(device_type=kind, bf16=bf16) for kind in ("cpu", "cuda") for bf16 in (True, False)
]


def config_of(mode: MixedPrecisionMode, level: PrecisionLevel) -> MixedPrecisionConfig:
    layers = ("head",) if mode is MixedPrecisionMode.SELECTIVE else ()
    return MixedPrecisionConfig(mode=mode, precision_level=level, selective_layers=layers)


def in_use(config: MixedPrecisionConfig) -> set[tuple[ComputeDtype, DeviceCapability]]:
    """The precisions that steps of this configuration may compute in, each with a device where they do."""
    found: set[tuple[ComputeDtype, DeviceCapability]] = set()
    for device in DEVICES:
        try:
            low = resolve(config, device).low_dtype
        except UnsupportedPrecisionError:
            continue
        found.add((low, device))
        adapts = MixedPrecisionMode.ADAPTIVE, PrecisionLevel.DYNAMIC
        if config.mode is adapts[0] or config.precision_level is adapts[1]:
            found.add(("float32", device))
    return found


SITUATIONS = [
    (config_of(*cell), dtype, device, verdict, trouble)
    for cell in CELLS
    for dtype, device in sorted(in_use(config_of(*cell)), key=str)
    for verdict in VERDICTS
    for trouble in TROUBLES
]


def test_every_verdict_precision_and_trouble_has_its_advice() -> None:
    assert set(TABLE) == set(itertools.product(VERDICTS, get_args(ComputeDtype)))
    assert all(set(remedies) == set(TROUBLES) for remedies in TABLE.values())
    assert all(remedies for row in TABLE.values() for remedies in row.values())


def test_what_is_advised_changes_something_and_is_accepted() -> None:
    for config, dtype, device, verdict, trouble in SITUATIONS:
        said = advice(trouble, config, dtype=dtype, verdict=verdict, layer="encoder.0")
        for mode, level in re.findall(r"(?:mode '(\w+)' with )?precision_level '(\w+)'", said):
            changes: dict[str, Any] = {"precision_level": PrecisionLevel(level)}
            if mode:
                changes["mode"] = MixedPrecisionMode(mode)
            changed = MixedPrecisionConfig.model_validate(config.model_dump() | changes)
            assert changed != config, said
            if level == "fp32" or device.bf16:
                assert resolve(changed, device).low_dtype != dtype, said


def test_bf16_is_advised_to_fp16_alone() -> None:
    for config, dtype, _, verdict, trouble in SITUATIONS:
        said = advice(trouble, config, dtype=dtype, verdict=verdict, layer="encoder.0")
        if dtype != "float16" or config.precision_level is PrecisionLevel.DYNAMIC:
            assert "bf16" not in said, (config.mode, config.precision_level, said)
        elif verdict == "precision":
            assert "precision_level 'bf16'" in said
        if dtype == "float32":
            assert "precision_level" not in said


def test_what_fp32_does_not_cure_is_no_question_of_precision() -> None:
    for config, dtype, _, _, trouble in SITUATIONS:
        if trouble == "range_exhausted":  # an applied step, which is not repeated
            continue
        said = advice(trouble, config, dtype=dtype, verdict="data_or_model", layer="encoder.0")
        assert "learning rate" in said
        assert "bad samples" in said
        assert not re.search("precision|fp32|bf16|scale", said)


@pytest.mark.parametrize("layer", [None, "input", "criterion"])
def test_only_a_module_can_be_kept_in_fp32(layer: str | None) -> None:
    config = config_of(MixedPrecisionMode.AUTOMATIC, PrecisionLevel.BF16)
    named = advice("non_finite_loss", config, dtype="bfloat16", verdict="precision", layer="head")
    assert named == "Keep 'head' in FP32 with fp32_layers or use precision_level 'fp32'."
    said = advice("non_finite_loss", config, dtype="bfloat16", verdict="precision", layer=layer)
    assert said == "Use precision_level 'fp32'."
