"""The model `mlp`: fully connected layers over flat features. Other models have their own files."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from halfstep.worker.training.components.parameters import Parameters, Share, Width
from halfstep.worker.training.components.registry import register_model
from halfstep.worker.training.data.dataset import DataInfo, InputKind, Task

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MlpParameters(Parameters):
    """Parameters of `mlp`."""

    hidden: Annotated[tuple[Width, ...], Field(max_length=64)] = Field(
        default=(256,), description="Width of each hidden layer; an empty list gives a linear model."
    )
    dropout: Share = Field(default=0.0, description="Share of hidden activations dropped in training.")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        default="relu", description="Function after each hidden layer."
    )
    norm: Literal["none", "batch", "layer"] = Field(
        default="none", description="Normalisation between a hidden layer and its activation."
    )


@register_model(
    "mlp",
    MlpParameters,
    summary="Fully connected network over flat features.",
    inputs=(InputKind.FEATURES,),
    tasks=(Task.CLASSIFICATION, Task.REGRESSION),
)
def build_mlp(parameters: MlpParameters, data: DataInfo) -> nn.Module:
    """Layers are fc1 … fcN and out; input (batch, features), output (batch, outputs)."""
    layers = nn.Sequential()
    width = data.shape[0]
    for number, hidden in enumerate(parameters.hidden, start=1):
        layers.add_module(f"fc{number}", nn.Linear(width, hidden))
        if parameters.norm == "batch":
            layers.add_module(f"norm{number}", nn.BatchNorm1d(hidden))
        elif parameters.norm == "layer":
            layers.add_module(f"norm{number}", nn.LayerNorm(hidden))
        layers.add_module(f"act{number}", _ACTIVATIONS[parameters.activation]())
        if parameters.dropout:
            layers.add_module(f"drop{number}", nn.Dropout(parameters.dropout))
        width = hidden
    layers.add_module("out", nn.Linear(width, data.outputs))
    return layers
