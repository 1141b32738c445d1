"""Components that a job can name: models, datasets, losses, optimizers and schedulers.

This is the door for packages that bring their own: the decorators, the parameter base class and the data
descriptions. The built-in components are imported when the catalogue is first asked for.
"""

from halfstep.worker.training.components.parameters import NoParameters, Parameters
from halfstep.worker.training.components.registry import (
    Component,
    Kind,
    Length,
    Registered,
    catalogue,
    find,
    load_built_in,
    load_entry_points,
    load_modules,
    register_dataset,
    register_loss,
    register_model,
    register_optimizer,
    register_scheduler,
)
from halfstep.worker.training.data.dataset import (
    DataInfo,
    DataRequest,
    Dataset,
    InputKind,
    Split,
    Task,
    TensorSplit,
    TokenSplit,
)

__all__ = [
    "Component",
    "DataInfo",
    "DataRequest",
    "Dataset",
    "InputKind",
    "Kind",
    "Length",
    "NoParameters",
    "Parameters",
    "Registered",
    "Split",
    "Task",
    "TensorSplit",
    "TokenSplit",
    "catalogue",
    "find",
    "load_built_in",
    "load_entry_points",
    "load_modules",
    "register_dataset",
    "register_loss",
    "register_model",
    "register_optimizer",
    "register_scheduler",
]
