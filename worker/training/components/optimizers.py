"""Optimizers of torch. The engine drives them; nothing here takes a step."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from halfstep.worker.training.components.parameters import Flag, NonNegative, Parameters, Positive, Share
from halfstep.worker.training.components.registry import register_optimizer
from halfstep.worker.training.errors import InvalidComponent

Weights = list[nn.Parameter]
Implementation = Literal["auto", "fused", "foreach", "plain"]

_LEARNING_RATE = "Learning rate, before any scheduler."
_IMPLEMENTATION = "Kernel: `auto` takes the fused one where torch has it; the three differ in the last bits."


class Adaptive(Parameters):
    """What the optimizers with Adam's two averages share."""

    lr: Positive = Field(default=1e-3, description=_LEARNING_RATE)
    betas: tuple[Share, Share] = Field(
        default=(0.9, 0.999), description="Decay of the averages of the gradient and of its square."
    )
    eps: Positive = Field(default=1e-8, description="Added to the denominator.")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty.")


class AdamParameters(Adaptive):
    """Parameters of `adam`."""

    amsgrad: Flag = Field(default=False, description="Keep the maximum of the second average.")
    implementation: Implementation = Field(default="auto", description=_IMPLEMENTATION)


class AdamWParameters(AdamParameters):
    """Parameters of `adamw`."""

    weight_decay: NonNegative = Field(default=0.01, description="Decoupled weight decay.")


class SgdParameters(Parameters):
    """Parameters of `sgd`."""

    lr: Positive = Field(default=1e-2, description=_LEARNING_RATE)
    momentum: Share = Field(default=0.0, description="Share of the last update that carries on.")
    dampening: Annotated[NonNegative, Field(le=1)] = Field(
        default=0.0, description="Damping of the momentum."
    )
    nesterov: Flag = Field(default=False, description="Nesterov's momentum; needs momentum and no dampening.")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty.")
    implementation: Implementation = Field(default="auto", description=_IMPLEMENTATION)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SgdParameters":
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov needs momentum above 0 and dampening 0; set them, or nesterov to false"
            )
        return self


class AdagradParameters(Parameters):
    """Parameters of `adagrad`."""

    lr: Positive = Field(default=1e-2, description=_LEARNING_RATE)
    lr_decay: NonNegative = Field(default=0.0, description="Decay of the learning rate with each step.")
    eps: Positive = Field(default=1e-10, description="Added to the denominator.")
    initial_accumulator_value: NonNegative = Field(default=0.0, description="Start of the sum of squares.")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty.")
    implementation: Implementation = Field(default="auto", description=_IMPLEMENTATION)


class RmspropParameters(Parameters):
    """Parameters of `rmsprop`."""

    lr: Positive = Field(default=1e-2, description=_LEARNING_RATE)
    alpha: Share = Field(default=0.99, description="Decay of the average of squares.")
    eps: Positive = Field(default=1e-8, description="Added to the denominator.")
    momentum: Share = Field(default=0.0, description="Share of the last update that carries on.")
    centered: Flag = Field(default=False, description="Normalise by the variance instead of the square.")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty.")


class AdamaxParameters(Adaptive):
    """Parameters of `adamax`."""

    lr: Positive = Field(default=2e-3, description=_LEARNING_RATE)


class NadamParameters(Adaptive):
    """Parameters of `nadam`."""

    lr: Positive = Field(default=2e-3, description=_LEARNING_RATE)
    momentum_decay: NonNegative = Field(default=4e-3, description="Decay of the momentum.")
    decoupled_weight_decay: Flag = Field(default=False, description="Decay the weights as AdamW does.")


class RadamParameters(Adaptive):
    """Parameters of `radam`."""

    decoupled_weight_decay: Flag = Field(default=False, description="Decay the weights as AdamW does.")


class AdadeltaParameters(Parameters):
    """Parameters of `adadelta`."""

    lr: Positive = Field(default=1.0, description=_LEARNING_RATE)
    rho: Share = Field(default=0.9, description="Decay of the averages of squares.")
    eps: Positive = Field(default=1e-6, description="Added to the denominator.")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty.")


class AdafactorParameters(Parameters):
    """Parameters of `adafactor`."""

    lr: Positive = Field(default=1e-2, description=_LEARNING_RATE)
    beta2_decay: Annotated[float, Field(strict=True, le=0, ge=-10)] = Field(
        default=-0.8, description="Exponent of the second average's decay with the step."
    )
    d: Positive = Field(default=1.0, description="Clipping threshold of an update.")
    weight_decay: NonNegative = Field(default=0.0, description="Decoupled weight decay.")


@register_optimizer(
    "adamw", AdamWParameters, summary="Adam with decoupled weight decay; the default at 1e-3."
)
def build_adamw(parameters: AdamWParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's AdamW."""
    return torch.optim.AdamW(weights, **_options(parameters), **_kernel(parameters.implementation, weights))


@register_optimizer("adam", AdamParameters, summary="Adam.")
def build_adam(parameters: AdamParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's Adam."""
    return torch.optim.Adam(weights, **_options(parameters), **_kernel(parameters.implementation, weights))


@register_optimizer("sgd", SgdParameters, summary="Stochastic gradient descent, with momentum if asked.")
def build_sgd(parameters: SgdParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's SGD."""
    # A fused first step that is skipped leaves a momentum buffer that dampening would make wrong.
    dampened = parameters.momentum > 0 and parameters.dampening > 0
    if dampened and parameters.implementation == "fused":
        raise InvalidComponent(
            "optimizer 'sgd': fused does not go with dampening; set implementation to 'auto'"
        )
    implementation = (
        "foreach" if dampened and parameters.implementation == "auto" else parameters.implementation
    )
    return torch.optim.SGD(weights, **_options(parameters), **_kernel(implementation, weights))


@register_optimizer("adagrad", AdagradParameters, summary="Adagrad.")
def build_adagrad(parameters: AdagradParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's Adagrad."""
    kernel = _kernel(parameters.implementation, weights, fused_on=("cpu",))
    return torch.optim.Adagrad(weights, **_options(parameters), **kernel)


@register_optimizer("rmsprop", RmspropParameters, summary="RMSprop.")
def build_rmsprop(parameters: RmspropParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's RMSprop."""
    return torch.optim.RMSprop(weights, **_options(parameters))


@register_optimizer("adamax", AdamaxParameters, summary="Adam with the maximum norm.")
def build_adamax(parameters: AdamaxParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's Adamax."""
    return torch.optim.Adamax(weights, **_options(parameters))


@register_optimizer("nadam", NadamParameters, summary="Adam with Nesterov's momentum.")
def build_nadam(parameters: NadamParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's NAdam."""
    return torch.optim.NAdam(weights, **_options(parameters))


@register_optimizer("radam", RadamParameters, summary="Adam with a rectified start, which needs no warm-up.")
def build_radam(parameters: RadamParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's RAdam."""
    return torch.optim.RAdam(weights, **_options(parameters))


@register_optimizer("adadelta", AdadeltaParameters, summary="Adadelta.")
def build_adadelta(parameters: AdadeltaParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's Adadelta."""
    return torch.optim.Adadelta(weights, **_options(parameters))


@register_optimizer("adafactor", AdafactorParameters, summary="Adafactor: second moments in factored form.")
def build_adafactor(parameters: AdafactorParameters, weights: Weights) -> torch.optim.Optimizer:
    """PyTorch's Adafactor."""
    return torch.optim.Adafactor(weights, **_options(parameters))


def _options(parameters: Parameters) -> dict[str, Any]:
    return {name: value for name, value in parameters if name != "implementation"}


def _kernel(
    implementation: str, weights: Weights, *, fused_on: Sequence[str] = ("cpu", "cuda")
) -> dict[str, Any]:
    if implementation == "auto":
        implementation = "fused" if weights[0].device.type in fused_on else "foreach"
    return {"fused": implementation == "fused", "foreach": implementation == "foreach"}
