"""What a precision policy decides about a step. Its default is a correct step in full precision.

A policy holds no counter of steps and reads nothing from the device; the step's order is `manager`'s.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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

    def optimized(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter that the optimizer updates in place of a model's parameter."""
        return parameter

    def region(self) -> AbstractContextManager[object]:
        """Where the forward pass and the loss run."""
        return nullcontext()

    def cast_input(self, batch: Any) -> Any:
        """The input as the model takes it; integer tensors are never cast."""
        return batch

    def cast_output(self, output: Any) -> Any:
        """The model's output as the criterion takes it."""
        return output

    def collect_gradients(self) -> None:
        """After the last backward pass: put gradients where the optimizer looks for them."""

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

    def notices(self) -> Iterable[str]:
        """What `attach` found worth a warning, a sentence each."""
        return ()
