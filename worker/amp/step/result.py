"""What `train_step` returns: a mapping that asks the device for a value only when a key is read."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfstep.worker.amp.record.ring import HEAD
from halfstep.worker.amp.record.step_record import Meaning, Terms, meaning_of


class EndedRow(NamedTuple):
    """The row of a step that ended, and what is needed to read it."""

    row: Tensor | tuple[float, ...]
    """Its numbers, the head first: on the device, or on the host where the host knew them."""
    rounding: float
    terms: Terms

    @property
    def scale(self) -> Tensor | float:
        """The scale used, where the row is."""
        return self.row[HEAD.index("scale")]

    def head(self) -> list[float]:
        """The head's numbers; waits for the device where they are there."""
        numbers = self.row[: len(HEAD)]
        return numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)

    def meaning(self) -> Meaning:
        """The flags."""
        rounding = np.full(1, self.rounding, dtype=np.float32)
        return meaning_of(np.array([self.head()], dtype=np.float32), rounding, self.terms)


class StepResult(Mapping[str, Any]):
    """One micro-batch and, where it ended a step, that step.

    Keys: loss (this micro-batch's), current_scale (the scale used), overflow_detected, underflow_detected,
    nan_detected (false until the step ends), memory_usage, output_shape, target_shape, device, is_step.
    """

    __slots__ = ("_device", "_ended", "_loss", "_memory_usage", "_output_shape", "_scale", "_target_shape")

    def __init__(
        self,
        *,
        loss: Tensor,
        scale: Tensor | float,
        ended: EndedRow | None,
        memory_usage: float,
        output_shape: Any,
        target_shape: Any,
        device: torch.device,
    ) -> None:
        self._loss = loss
        self._scale = scale
        self._ended = ended
        self._memory_usage = memory_usage
        self._output_shape = output_shape
        self._target_shape = target_shape
        self._device = device

    def _current_scale(self) -> float:
        return float(self._scale if self._ended is None else self._ended.head()[HEAD.index("scale")])

    def _flag(self, name: str) -> bool:
        return self._ended is not None and bool(getattr(self._ended.meaning(), name)[0])

    _readers: ClassVar[dict[str, Callable[["StepResult"], Any]]] = {
        "loss": lambda self: float(self._loss.item()),
        "current_scale": _current_scale,
        "overflow_detected": lambda self: self._flag("overflow"),
        "underflow_detected": lambda self: self._flag("underflow"),
        "nan_detected": lambda self: self._flag("nan"),
        "memory_usage": lambda self: self._memory_usage,
        "output_shape": lambda self: self._output_shape,
        "target_shape": lambda self: self._target_shape,
        "device": lambda self: str(self._device),
        "is_step": lambda self: self._ended is not None,
    }

    def __getitem__(self, key: str) -> Any:
        return self._readers[key](self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __repr__(self) -> str:
        return f"StepResult({dict(self)!r})"
