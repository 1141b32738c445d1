"""The dataset `text`: the bytes of files under an allowed directory, for models of byte sequences.

By default the Python standard library's own sources, which every worker has. Other datasets have their own
files.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, StringConstraints
from torch import Tensor

from halfstep.worker.training.components.parameters import Integer, Parameters
from halfstep.worker.training.components.registry import register_dataset
from halfstep.worker.training.data.dataset import (
    DataInfo,
    DataRequest,
    Dataset,
    InputKind,
    Task,
    TokenSplit,
)
from halfstep.worker.training.errors import DataError

_VOCABULARY = 256
_DEFAULT_LENGTH = 128
_NOT_PROSE = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "pydoc_data"}
)
"""Parts of the standard library's directory that are installed packages, tests or tables."""


class TextParameters(Parameters):
    """Parameters of `text`."""

    root: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="A directory that the operator allows, or one below; null: the Python standard library.",
    )
    pattern: Annotated[str, StringConstraints(pattern=r"^[^/\\]+$", max_length=200)] = Field(
        default="*.py", description="File names to read, as a shell pattern."
    )
    max_bytes: Annotated[Integer, Field(ge=1024, le=2**34)] = Field(
        default=16 * 2**20, description="Reading stops here; files are taken in the order of their paths."
    )
    held_out_bytes: Annotated[Integer, Field(ge=256, le=2**30)] = Field(
        default=65_536, description="Bytes at the end that are held out for evaluation."
    )


@register_dataset(
    "text",
    TextParameters,
    summary="Bytes of text files, by default the Python standard library's own sources.",
    task=Task.LANGUAGE,
)
def build_text(parameters: TextParameters, request: DataRequest) -> Dataset:
    """Windows of the model's context length; the stream's tail is held out."""
    standard_library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    root = (
        standard_library if parameters.root is None else _allowed(parameters.root, request, standard_library)
    )
    stream = _read(root, parameters.pattern, parameters.max_bytes)
    length = request.sequence_length or _DEFAULT_LENGTH
    training_bytes = len(stream) - parameters.held_out_bytes
    if training_bytes <= length or parameters.held_out_bytes <= length:
        raise DataError(
            f"dataset 'text' has {len(stream)} bytes, of which held_out_bytes takes "
            f"{parameters.held_out_bytes}, but both parts need more than the model's context of {length}: "
            "allow more text, or change held_out_bytes or the context"
        )
    return Dataset(
        train=TokenSplit(stream[:training_bytes], length),
        held_out=TokenSplit(stream[training_bytes:], length),
        info=DataInfo(task=Task.LANGUAGE, inputs=InputKind.TOKENS, shape=(length,), outputs=_VOCABULARY),
    )


def _allowed(name: str, request: DataRequest, standard_library: Path) -> Path:
    roots = [root.resolve() for root in request.text_roots]
    # Resolved first: neither `..` nor a symbolic link leads out of what is allowed.
    path = Path(name).resolve()
    if not any(path.is_relative_to(root) for root in (*roots, standard_library)):
        shown = ", ".join(map(str, roots)) or "none besides the Python standard library"
        raise DataError(
            f"dataset 'text' may not read {name}; allowed on this worker: {shown}. Put the files under an "
            "allowed directory, or ask the operator to add this one to HALFSTEP_TEXT_ROOTS",
            detail={"pointer": "/dataset/params/root"},
        )
    if not path.is_dir():
        raise DataError(
            f"dataset 'text': {name} is not a directory on this worker; correct root",
            detail={"pointer": "/dataset/params/root"},
        )
    return path


def _read(root: Path, pattern: str, most: int) -> Tensor:
    content = bytearray()
    files = 0
    for path in _files(root, pattern):
        try:
            content += path.read_bytes()[: most - len(content)]
        except OSError as error:
            raise DataError(
                f"dataset 'text' cannot read {path}: {error.strerror}; correct its permissions or leave it "
                "out by pattern"
            ) from error
        files += 1
        if len(content) >= most:
            break
    if not content:
        raise DataError(
            f"dataset 'text' found {files} files named '{pattern}' under {root} and no bytes in them; "
            "correct root or pattern"
        )
    return torch.frombuffer(content, dtype=torch.uint8)


def _files(root: Path, pattern: str) -> Iterator[Path]:
    for directory, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in _NOT_PROSE and not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if path.match(pattern) and path.is_file() and path.resolve().is_relative_to(root):
                yield path
