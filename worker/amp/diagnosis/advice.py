"""What to try when a step is not finite: one table, by what a repetition said and by the precision in use.

Only words live here. What happened is `run_health`'s, and where it was seen `attribution`'s.
"""

from enum import Enum, auto
from typing import Literal, get_args

from halfstep.service.contract.precision import (
    REFUSED_CELLS,
    ComputeDtype,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    PrecisionLevel,
)
from halfstep.worker.amp.errors import Cause, Verdict

Trouble = Cause | Literal["range_exhausted"]
"""Why a step was bad, or that gradients underflow at the largest scale allowed."""


class Remedy(Enum):
    """One thing to try."""

    DATA = auto()
    LEARNING_RATE = auto()
    BF16 = auto()
    FP32 = auto()
    LAYER = auto()
    """Where the layer is known."""
    INITIAL_SCALE = auto()
    MIN_SCALE = auto()
    MAX_SCALE = auto()


_GRADIENTS: Trouble = "non_finite_gradients"
_LOSS: Trouble = "non_finite_loss"
_EXHAUSTED: Trouble = "scale_exhausted"
_UNDERFLOW: Trouble = "range_exhausted"
_MODEL = (Remedy.LEARNING_RATE, Remedy.DATA)
_SAMPLES = (Remedy.DATA, Remedy.LEARNING_RATE)

_ANY_PRECISION: dict[Trouble, tuple[Remedy, ...]] = {
    _GRADIENTS: _MODEL,
    _LOSS: _SAMPLES,
    _EXHAUSTED: _MODEL,
    _UNDERFLOW: (Remedy.MAX_SCALE,),
}
"""What FP32 does not cure is no question of precision, and neither is what happens in FP32."""

TABLE: dict[tuple[Verdict | None, ComputeDtype], dict[Trouble, tuple[Remedy, ...]]] = {
    ("precision", "float16"): {
        _GRADIENTS: (Remedy.BF16, Remedy.LAYER),
        _LOSS: (Remedy.BF16, Remedy.LAYER),
        _EXHAUSTED: (Remedy.BF16, Remedy.LAYER, Remedy.MIN_SCALE),
        _UNDERFLOW: (Remedy.BF16, Remedy.MAX_SCALE),
    },
    # BF16 has the range of FP32: what it lacks are digits, and another low precision does not bring them.
    ("precision", "bfloat16"): dict.fromkeys(get_args(Cause), (Remedy.LAYER, Remedy.FP32))
    | {_UNDERFLOW: (Remedy.FP32,)},
    # In FP32 only the scaled loss differs from the repetition, which has no scale.
    ("precision", "float32"): {
        _GRADIENTS: (Remedy.INITIAL_SCALE, Remedy.LEARNING_RATE),
        _LOSS: _SAMPLES,
        _EXHAUSTED: (Remedy.MIN_SCALE, Remedy.LEARNING_RATE),
        _UNDERFLOW: (Remedy.MAX_SCALE,),
    },
    ("data_or_model", "float16"): _ANY_PRECISION,
    ("data_or_model", "bfloat16"): _ANY_PRECISION,
    ("data_or_model", "float32"): _ANY_PRECISION,
    (None, "float16"): {
        _GRADIENTS: (Remedy.LEARNING_RATE, Remedy.INITIAL_SCALE, Remedy.BF16),
        _LOSS: (*_SAMPLES, Remedy.BF16),
        _EXHAUSTED: (Remedy.BF16, Remedy.MIN_SCALE),
        _UNDERFLOW: (Remedy.BF16, Remedy.MAX_SCALE),
    },
    (None, "bfloat16"): {
        _GRADIENTS: (*_MODEL, Remedy.FP32),
        _LOSS: (*_SAMPLES, Remedy.FP32),
        _EXHAUSTED: (*_MODEL, Remedy.FP32),
        _UNDERFLOW: (Remedy.FP32,),
    },
    (None, "float32"): _ANY_PRECISION,
}
"""By verdict (None: not repeated) and the precision that the step computed in; the first is the best."""

_WORDS = {
    Remedy.DATA: "look for bad samples",
    Remedy.LEARNING_RATE: "lower the learning rate",
    Remedy.INITIAL_SCALE: "lower initial_scale",
    Remedy.MIN_SCALE: "lower min_scale",
    Remedy.MAX_SCALE: "raise max_scale",
}
_NO_MODULES = frozenset({None, "input", "criterion"})


def advice(
    trouble: Trouble,
    config: MixedPrecisionConfig,
    *,
    dtype: ComputeDtype,
    verdict: Verdict | None = None,
    layer: str | None = None,
) -> str:
    """What to try, as a sentence.

    Args:
        trouble: what happened.
        config: of the run; nothing is advised that it would refuse.
        dtype: the precision in use when it happened.
        verdict: what the step's repetition in FP32 said.
        layer: where it was first seen.
    """
    words = []
    for remedy in TABLE[verdict, dtype][trouble]:
        if remedy in _WORDS:
            words.append(_WORDS[remedy])
        elif remedy is Remedy.BF16:
            # 'dynamic' computes in FP16 only where the device has no BF16.
            dynamic = config.precision_level is PrecisionLevel.DYNAMIC
            words.append(_level(config.mode, PrecisionLevel.FP32 if dynamic else PrecisionLevel.BF16))
        elif remedy is Remedy.FP32:
            words.append(_level(config.mode, PrecisionLevel.FP32))
        elif layer not in _NO_MODULES:
            words.append(f"keep '{layer}' in FP32 with fp32_layers")
    sentence = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _level(mode: MixedPrecisionMode, level: PrecisionLevel) -> str:
    other_mode = "mode 'automatic' with " if (mode, level) in REFUSED_CELLS else ""
    return f"use {other_mode}precision_level '{level.value}'"
