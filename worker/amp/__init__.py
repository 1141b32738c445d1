"""Mixed-precision training for PyTorch: a configuration, a trainer, and a record of every step.

config = MixedPrecisionConfig(precision_level=PrecisionLevel.BF16)
trainer = MixedPrecisionTrainer(config)
trainer.setup_training(model, optimizer, criterion)
trainer.train(loader, num_epochs=10)
"""

from service.contract.precision import MixedPrecisionConfig, MixedPrecisionMode, PrecisionLevel
from worker.amp.manager import MixedPrecisionManager
from worker.amp.state import MixedPrecisionState
from worker.amp.trainer import MixedPrecisionTrainer

__all__ = [
    "MixedPrecisionConfig",
    "MixedPrecisionManager",
    "MixedPrecisionMode",
    "MixedPrecisionState",
    "MixedPrecisionTrainer",
    "PrecisionLevel",
]
