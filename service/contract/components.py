"""What a spec names: the kinds of components, and the tasks of datasets."""

from collections.abc import Mapping
from typing import Literal, get_args

ComponentKind = Literal["model", "dataset", "loss", "optimizer", "scheduler"]
COMPONENT_KINDS: tuple[ComponentKind, ...] = get_args(ComponentKind)
"""The kinds, in the order of a spec's blocks."""

Task = Literal["classification", "regression", "language"]
"""What a dataset is for: `task` in its component's `extra`."""

DEFAULT_LOSS: Mapping[str, str] = {
    "classification": "cross_entropy",
    "language": "cross_entropy",
    "regression": "mse",
}
"""The loss of a job that names none, by its dataset's task."""
