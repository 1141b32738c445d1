"""Mixed-precision training for PyTorch: a configuration, a trainer, and a record of every step.

config = MixedPrecisionConfig(precision_level=PrecisionLevel.BF16)
trainer = MixedPrecisionTrainer(config)
trainer.setup_training(model, optimizer, criterion)
trainer.train(loader, num_epochs=10)
"""

from halfstep.service.contract.precision import MixedPrecisionConfig, MixedPrecisionMode, PrecisionLevel
from halfstep.worker.amp.diagnosis.state import MixedPrecisionState
from halfstep.worker.amp.manager import MixedPrecisionManager
from halfstep.worker.amp.trainer import MixedPrecisionTrainer

__all__ = [
    "MixedPrecisionConfig",
    "MixedPrecisionManager",
    "MixedPrecisionMode",
    "MixedPrecisionState",
    "MixedPrecisionTrainer",
    "PrecisionLevel",
]
