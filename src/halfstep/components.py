"""What a package imports to bring models, datasets, losses, optimizers and schedulers of its own.

    from halfstep.components import DataInfo, Parameters, register_model

A module that registers components is named in `HALFSTEP_COMPONENT_MODULES`, or its package declares entry
points in the groups `halfstep.models`, `halfstep.datasets`, `halfstep.losses`, `halfstep.optimizers` and
`halfstep.schedulers`. Importing it needs torch.
"""

from halfstep.worker.training.components import (
    DataInfo,
    DataRequest,
    Dataset,
    InputKind,
    Length,
    NoParameters,
    Parameters,
    Split,
    Task,
    TensorSplit,
    TokenSplit,
    register_dataset,
    register_loss,
    register_model,
    register_optimizer,
    register_scheduler,
)

__all__ = [
    "DataInfo",
    "DataRequest",
    "Dataset",
    "InputKind",
    "Length",
    "NoParameters",
    "Parameters",
    "Split",
    "Task",
    "TensorSplit",
    "TokenSplit",
    "register_dataset",
    "register_loss",
    "register_model",
    "register_optimizer",
    "register_scheduler",
]
