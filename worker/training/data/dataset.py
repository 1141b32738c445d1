"""What a dataset is: its description, its splits, and the order in which an epoch visits them.

The order of an epoch is a function of (seed, epoch) alone and draws nothing from the global random number
generators. Batches are assembled here by index; no worker processes, no files and no components live here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from halfstep.worker.training.errors import DataError


class Task(StrEnum):
    """What there is to learn; it decides the default loss and the evaluation's metrics."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    LANGUAGE = "language"


class InputKind(StrEnum):
    """The shape of one input sample."""

    FEATURES = "features"  # float, (features,)
    IMAGE = "image"  # float, (channels, height, width)
    TOKENS = "tokens"  # int64, (sequence,)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRequest:
    """What the model asks of the dataset, and what the dataset may read.

    Attributes:
        inputs: the input kinds that the model takes, most welcome first.
        sequence_length: tokens in one sample, for models of sequences.
        text_roots: directories that files may be read from, beside the Python standard library.
        seed: the job's seed, which decides the order of each epoch.
        samples_per_step: samples of one optimizer step.
    """

    inputs: Sequence[InputKind]
    sequence_length: int | None = None
    text_roots: Sequence[Path] = ()
    seed: int = 0
    samples_per_step: int = 1

    def choose(self, offered: Sequence[InputKind]) -> InputKind:
        """The model's most welcome kind among those offered; the first offered when none fits.

        Whether the two fit together is judged once, by the assembly, which names both components.
        """
        return next((kind for kind in self.inputs if kind in offered), offered[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """What a model and a loss may know of the data.

    Attributes:
        task: what there is to learn.
        inputs: the kind of one sample.
        shape: the shape of one sample, without the batch.
        outputs: classes, targets of a regression, or the vocabulary.
    """

    task: Task
    inputs: InputKind
    shape: tuple[int, ...]
    outputs: int


class Split(Protocol):
    """Samples that can be fetched by index. Implementations hold no cursor and draw no random numbers."""

    @property
    def device(self) -> torch.device:
        """Where `batch` wants its indices."""

    @property
    def nbytes(self) -> int:
        """Bytes that `to` would move; 0 where the samples stay where they are."""

    def __len__(self) -> int:
        """Samples."""

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """The samples at `indices` (int64, on the split's device) as an (input, target) pair of tensors."""

    def to(self, device: torch.device) -> Self:
        """The split with its samples on `device`; itself where they stay where they are."""

    def fingerprint(self) -> str:
        """A hash of the content, by which a resumed run knows that the data did not change."""


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """Samples as rows of two tensors. Shapes: inputs (samples, …), targets (samples, …)."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"the dataset has {len(self.inputs)} inputs and {len(self.targets)} targets; there must be "
                "one each"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.inputs.device

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.inputs.nbytes + self.targets.nbytes

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The rows at `indices`."""
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)

    def to(self, device: torch.device) -> "TensorSplit":
        """The split on `device`."""
        return TensorSplit(self.inputs.to(device), self.targets.to(device))

    def fingerprint(self) -> str:
        """SHA-256 over both tensors."""
        return _digest(self.inputs, self.targets)


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """Windows of a token stream: sample i is `length` tokens from i·length; its target is one token further.

    The windows do not overlap, and a tail shorter than length + 1 is left out.
    """

    tokens: Tensor  # uint8 or int64, (stream,)
    length: int

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    @property
    def device(self) -> torch.device:
        """Where the stream is."""
        return self.tokens.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return self.tokens.nbytes

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both int64 of shape (batch, length)."""
        offsets = torch.arange(self.length + 1, device=self.tokens.device)
        windows = self.tokens[indices.unsqueeze(1) * self.length + offsets].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def to(self, device: torch.device) -> "TokenSplit":
        """The split on `device`."""
        return TokenSplit(self.tokens.to(device), self.length)

    def fingerprint(self) -> str:
        """SHA-256 over the stream and the window length."""
        return _digest(self.tokens, torch.tensor(self.length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A training split, a held-out split (empty: None) and their description."""

    train: Split
    held_out: Split | None
    info: DataInfo
    held_out_name: str = "held_out"

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise DataError("the dataset has no training samples; choose parameters that leave at least one")


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """The order of one epoch: a permutation of range(samples), int64 on the CPU, from (seed, epoch) alone."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(samples, generator=generator)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
