"""Mixed-precision training for PyTorch, as a library and as a service.

    from halfstep import MixedPrecisionConfig, MixedPrecisionTrainer, PrecisionLevel

    config = MixedPrecisionConfig(precision_level=PrecisionLevel.BF16)
    trainer = MixedPrecisionTrainer(config)
    trainer.setup_training(model, optimizer, criterion)
    trainer.train(loader, num_epochs=10)

The engine's names are imported when they are first used, so that a host which runs only the HTTP API needs
no torch. `halfstep.components` is for packages that bring models or data of their own.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfstep.worker.amp import (
        MixedPrecisionConfig,
        MixedPrecisionManager,
        MixedPrecisionMode,
        MixedPrecisionState,
        MixedPrecisionTrainer,
        PrecisionLevel,
    )

__all__ = [
    "MixedPrecisionConfig",
    "MixedPrecisionManager",
    "MixedPrecisionMode",
    "MixedPrecisionState",
    "MixedPrecisionTrainer",
    "PrecisionLevel",
]


def __getattr__(name: str) -> Any:  # Any: each name has a type of its own
    if name not in __all__:
        raise AttributeError(f"module 'halfstep' has no attribute '{name}'")
    try:
        engine = importlib.import_module("halfstep.worker.amp")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"torch", "numpy", "halfstep"}:
            raise
        raise ImportError(
            f"halfstep.{name} needs the engine's packages ({error}): pip install 'halfstep[worker]'"
        ) from error
    return getattr(engine, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
