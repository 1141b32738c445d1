"""Losses of torch, each a mean over the batch computed in float32 whatever the model's outputs are in.

Only criteria live here; metrics of an evaluation are computed beside it.
"""

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from halfstep.worker.training.components.parameters import Flag, NoParameters, Parameters, Positive, Share
from halfstep.worker.training.components.registry import register_loss
from halfstep.worker.training.data.dataset import DataInfo, Task

Function = Callable[..., Tensor]


class Loss(nn.Module):
    """A torch loss function with its options, applied to float32 outputs."""

    def __init__(self, function: Function, *, one_hot: int = 0, **options: Any) -> None:
        super().__init__()
        self.function = function
        self.one_hot = one_hot
        self.options = options

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss; sequences (batch, sequence, classes) count every position as a sample."""
        output = output.float()
        if output.dim() == 3 and not target.is_floating_point():
            output, target = output.flatten(0, 1), target.flatten()
        if self.one_hot:
            target = functional.one_hot(target, self.one_hot).to(output.dtype)
        return self.function(output, target, **self.options)


class CrossEntropyParameters(Parameters):
    """Parameters of `cross_entropy`."""

    label_smoothing: Share = Field(default=0.0, description="Share of the target spread over all classes.")


class SmoothL1Parameters(Parameters):
    """Parameters of `smooth_l1`."""

    beta: Positive = Field(default=1.0, description="Error at which it turns from quadratic to linear.")


class HuberParameters(Parameters):
    """Parameters of `huber`."""

    delta: Positive = Field(default=1.0, description="Error at which it turns from quadratic to linear.")


class MultiMarginParameters(Parameters):
    """Parameters of `multi_margin`."""

    margin: Positive = Field(
        default=1.0, description="Distance that the right class must keep from every other."
    )


class PoissonParameters(Parameters):
    """Parameters of `poisson_nll`."""

    log_input: Flag = Field(default=True, description="The model's output is the logarithm of the rate.")


@register_loss(
    "cross_entropy",
    CrossEntropyParameters,
    summary="Cross-entropy of class logits; the default for classification and language.",
    tasks=(Task.CLASSIFICATION, Task.LANGUAGE),
)
def build_cross_entropy(parameters: CrossEntropyParameters, _data: DataInfo) -> nn.Module:
    """Logits (batch, classes) or (batch, sequence, classes) against int64 classes."""
    return Loss(functional.cross_entropy, label_smoothing=parameters.label_smoothing)


@register_loss(
    "multi_margin", MultiMarginParameters, summary="Multi-class hinge loss.", tasks=(Task.CLASSIFICATION,)
)
def build_multi_margin(parameters: MultiMarginParameters, _data: DataInfo) -> nn.Module:
    """Scores (batch, classes) against int64 classes."""
    return Loss(functional.multi_margin_loss, margin=parameters.margin)


@register_loss(
    "bce_with_logits",
    NoParameters,
    summary="Binary cross-entropy of each class against the rest.",
    tasks=(Task.CLASSIFICATION,),
)
def build_bce_with_logits(_parameters: NoParameters, data: DataInfo) -> nn.Module:
    """Logits (batch, classes) against int64 classes, one-hot encoded here."""
    return Loss(functional.binary_cross_entropy_with_logits, one_hot=data.outputs)


@register_loss(
    "mse", NoParameters, summary="Mean squared error; the default for regression.", tasks=(Task.REGRESSION,)
)
def build_mse(_parameters: NoParameters, _data: DataInfo) -> nn.Module:
    """Values (batch, targets) against values."""
    return Loss(functional.mse_loss)


@register_loss("l1", NoParameters, summary="Mean absolute error.", tasks=(Task.REGRESSION,))
def build_l1(_parameters: NoParameters, _data: DataInfo) -> nn.Module:
    """Values (batch, targets) against values."""
    return Loss(functional.l1_loss)


@register_loss(
    "smooth_l1",
    SmoothL1Parameters,
    summary="Quadratic near zero, linear beyond beta.",
    tasks=(Task.REGRESSION,),
)
def build_smooth_l1(parameters: SmoothL1Parameters, _data: DataInfo) -> nn.Module:
    """Values (batch, targets) against values."""
    return Loss(functional.smooth_l1_loss, beta=parameters.beta)


@register_loss("huber", HuberParameters, summary="Huber loss.", tasks=(Task.REGRESSION,))
def build_huber(parameters: HuberParameters, _data: DataInfo) -> nn.Module:
    """Values (batch, targets) against values."""
    return Loss(functional.huber_loss, delta=parameters.delta)


@register_loss(
    "poisson_nll", PoissonParameters, summary="Negative log-likelihood of counts.", tasks=(Task.REGRESSION,)
)
def build_poisson_nll(parameters: PoissonParameters, _data: DataInfo) -> nn.Module:
    """Rates or their logarithms (batch, targets) against counts."""
    return Loss(functional.poisson_nll_loss, log_input=parameters.log_input)
