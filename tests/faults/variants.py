"""The jobs that faults are thrown at, and how each must end however often it is interrupted."""

from dataclasses import dataclass
from typing import Any

STEPS = 90
SAVE_EVERY = 5


@dataclass(frozen=True, slots=True)
class Variant:
    """A job's specification; `code` is why it fails where it must fail."""

    spec: dict[str, Any]
    code: str | None = None


def _spec(name: str, precision: dict[str, Any], *, steps: int = STEPS, **blocks: Any) -> dict[str, Any]:
    training = {
        "max_steps": steps,
        "batch_size": 16,
        "checkpoint_every_steps": SAVE_EVERY,
        "seed": 7,
        **blocks.pop("training", {}),
    }
    return {
        "name": name,
        "model": {"name": "paced", "params": blocks.pop("params", {})},
        "dataset": {"name": "synthetic", "params": {"samples": 320, "held_out_samples": 32}},
        "optimizer": {"name": "adamw", "params": {"lr": 0.01}},
        "scheduler": {"name": "step_lr", "params": {"step_size": 7, "gamma": 0.9}, "interval": "step"},
        "precision": precision,
        "training": training,
        "max_attempts": 100,
        "tags": {"variant": name},
        **blocks,
    }


USUAL = {
    "plain": Variant(_spec("plain", {"precision_level": "fp32"})),
    "scaled": Variant(
        _spec(
            "scaled",
            {"mode": "automatic", "precision_level": "fp16", "initial_scale": 2.0**24, "scale_window": 9},
        )
    ),
    "gathered": Variant(
        _spec(
            "gathered",
            {"mode": "automatic", "precision_level": "bf16"},
            training={"gradient_accumulation_steps": 2},
            params={"milliseconds": 5.0},
        )
    ),
}
HOPELESS = {
    "hungry": Variant(
        _spec("hungry", {"precision_level": "fp32"}, params={"hungry_at": 20}), code="out_of_memory_host"
    ),
    "never-finite": Variant(
        _spec(
            "never-finite",
            {"precision_level": "fp32"},
            optimizer={"name": "sgd", "params": {"lr": 1e30}},
            scheduler=None,
        ),
        code="non_finite_loss",
    ),
}
VARIANTS = {**USUAL, **HOPELESS}
