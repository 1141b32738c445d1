"""What a spec names: the kinds of components, and the tasks of datasets."""

from typing import Literal, get_args

ComponentKind = Literal["model", "dataset", "loss", "optimizer", "scheduler"]
COMPONENT_KINDS: tuple[ComponentKind, ...] = get_args(ComponentKind)
"""The kinds, in the order of a spec's blocks."""

Task = Literal["classification", "regression", "language"]
"""What a dataset is for: `task` in its component's `extra`."""
