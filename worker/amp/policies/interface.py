"""What a precision policy decides about a step. Its default is a correct step in full precision.

A policy holds no counter of steps and reads nothing from the device; the step's order is `manager`'s.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.worker.amp.layers import BorderCast
from halfstep.worker.amp.record.rows import FinishedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A change of precision after `step`, or a look at memory that changed nothing (origin and target alike).

    `origin` and `target` are a compute type ("float32", "bfloat16", "float16"), followed in mode SELECTIVE by
    the layers that run in it.
    """

    step: int
    origin: str
    target: str
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def cures(self) -> bool:
        """Skipped steps are the reason for it."""
        return self.reason in {"nan", "scale_exhausted", "overflow_share"}


class PrecisionPolicy:
    """Full precision: nothing is cast, nothing is scaled.

    Attributes:
        compute_dtype: the type that this step's low-precision work uses; float32 where nothing is lowered.
        scales: whether this step's loss is multiplied by the loss scale.
    """

    compute_dtype: torch.dtype = torch.float32
    scales: bool = False

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Prepare the model and the optimizer, once, before the first step."""

    def detach(self) -> None:
        """Give the model back as `attach` found it, its weights as trained; no step follows."""

    def optimized(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter that the optimizer updates in place of a model's parameter."""
        return parameter

    def region(self) -> AbstractContextManager[object]:
        """Where the forward pass and the loss run."""
        return nullcontext()

    def full_precision(self) -> AbstractContextManager[object]:
        """Where a step can be repeated in FP32, to see whether precision was the trouble."""
        return nullcontext()

    def cast_input(self, batch: Any) -> Any:
        """The input as the model takes it; integer tensors are never cast."""
        return batch

    def cast_output(self, output: Any) -> Any:
        """The model's output as the criterion takes it."""
        return output

    def borders(self) -> Iterable[BorderCast]:
        """Where types change inside the model, after `attach`."""
        return ()

    def collect_gradients(self) -> None:
        """After each backward pass: put gradients where the optimizer looks for them."""

    def publish_weights(self) -> None:
        """After the update: bring the optimizer's parameters back into the model."""

    def release_gradients(self) -> None:
        """Free gradients that the optimizer does not know of."""

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict as it is exported and hashed."""
        return model.state_dict()

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Take back what `weights` gave."""
        model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """What the policy adds to a saved run: primitives and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def saw_input(self, batch: Any) -> None:
        """This micro-batch is about to run."""

    def observe(self, finished: Sequence[FinishedStep]) -> None:
        """Take finished steps into account, in order."""

    def decides_after(self, step: int) -> bool:
        """Whether the policy must be asked after this step, besides the regular decision steps."""
        del step
        return False

    def decide(self, step: int) -> Transition | None:
        """What changes after `step`, if anything does; asked at decision steps, all steps observed."""
        del step
        return None

    @property
    def retries(self) -> bool:
        """Whether a step that runs out of memory can be tried again with less."""
        return False

    def out_of_memory(self, step: int) -> Transition | None:
        """What to change so that a batch that did not fit in memory can be tried again; None: nothing."""
        del step
        return None

    def apply(self, transition: Transition) -> None:
        """Let a transition take effect."""
        raise NotImplementedError(f"{type(self).__name__} decides nothing, so {transition} is not its own")

    def replay(self, transitions: Sequence[Transition]) -> None:
        """Transitions that an earlier life of the run made, to be made at the same steps again."""

    def notices(self) -> Iterable[str]:
        """What `attach` found worth a warning, a sentence each."""
        return ()
