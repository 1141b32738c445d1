"""The dataset `digits`: scikit-learn's handwritten digits, 1 797 real 8x8 images of 10 classes.

The file is read from the installed package without importing it, which would cost a second. Other datasets
have their own files.
"""

import gzip
import importlib.util
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from halfstep.worker.training.components.parameters import NoParameters
from halfstep.worker.training.components.registry import register_dataset
from halfstep.worker.training.data.dataset import (
    DataInfo,
    DataRequest,
    Dataset,
    InputKind,
    Task,
    TensorSplit,
)
from halfstep.worker.training.errors import DataError

_BRIGHTEST = 16.0
_IMAGES, _COLUMNS = 1797, 65
_HELD_OUT_EVERY = 5
"""Every fifth image is held out; the file runs through all writers, so the split does too."""


@register_dataset(
    "digits",
    NoParameters,
    summary="scikit-learn's handwritten digits: 1 438 images to train on and 359 held out, 10 classes.",
    task=Task.CLASSIFICATION,
)
def build_digits(_parameters: NoParameters, request: DataRequest) -> Dataset:
    """Flat (64,) or image (1, 8, 8) samples in 0..1, by what the model wants."""
    rows = _read(_file())
    inputs = request.choose((InputKind.FEATURES, InputKind.IMAGE))
    shape = (64,) if inputs is InputKind.FEATURES else (1, 8, 8)
    pixels = torch.from_numpy(rows[:, :64] / _BRIGHTEST).float().reshape(-1, *shape)
    labels = torch.from_numpy(rows[:, 64]).long()
    held_out = torch.arange(len(rows)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    return Dataset(
        train=TensorSplit(pixels[~held_out], labels[~held_out]),
        held_out=TensorSplit(pixels[held_out], labels[held_out]),
        info=DataInfo(task=Task.CLASSIFICATION, inputs=inputs, shape=shape, outputs=10),
    )


def _file() -> Path:
    spec = importlib.util.find_spec("sklearn")
    locations = spec.submodule_search_locations if spec is not None else None
    if not locations:
        raise DataError(
            "dataset 'digits' is part of scikit-learn, which this worker does not have; "
            "install halfstep[datasets] there"
        )
    return Path(locations[0]) / "datasets" / "data" / "digits.csv.gz"


def _read(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    try:
        with gzip.open(path, "rb") as file:
            text = file.read().replace(b"\n", b",").rstrip(b",").decode("ascii")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"dataset 'digits' cannot be read from {path}: {error}; reinstall scikit-learn on the worker"
        ) from error
    # All of its numbers are small integers: this takes a fifth of what a general reader of tables does.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # text that is no number ends the row of numbers
        try:
            numbers = np.fromstring(text, dtype=np.uint8, sep=",")
        except ValueError:
            numbers = np.empty(0, dtype=np.uint8)
    if numbers.size != _IMAGES * _COLUMNS:
        raise DataError(
            f"{path} holds {numbers.size} numbers instead of {_IMAGES * _COLUMNS}; reinstall scikit-learn"
        )
    return numbers.reshape(_IMAGES, _COLUMNS)
