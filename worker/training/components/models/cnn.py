"""The model `cnn`.

Two convolutions and two linear layers over small images. Other models have their own files.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from halfstep.worker.training.components.parameters import Flag, Integer, Parameters, Share, Width
from halfstep.worker.training.components.registry import register_model
from halfstep.worker.training.data.dataset import DataInfo, InputKind, Task
from halfstep.worker.training.errors import InvalidComponent


class CnnParameters(Parameters):
    """Parameters of `cnn`."""

    channels: tuple[Width, Width] = Field(default=(16, 32), description="Channels of conv1 and conv2.")
    hidden: Width = Field(default=64, description="Width of fc1.")
    kernel_size: Annotated[Integer, Field(ge=1, le=15)] = Field(
        default=3, description="Edge of both convolutions' kernels; odd keeps the size."
    )
    batch_norm: Flag = Field(default=False, description="Batch normalisation after each convolution.")
    dropout: Share = Field(default=0.0, description="Share of fc1's activations dropped in training.")


class Cnn(nn.Module):
    """conv1 → conv2 → fc1 → fc2. Input (batch, channels, height, width), output (batch, outputs)."""

    def __init__(self, parameters: CnnParameters, data: DataInfo) -> None:
        super().__init__()
        channels, height, width = data.shape
        if height < 2 or width < 2:
            raise InvalidComponent(
                "model 'cnn' halves its images once and needs at least 2x2 pixels; these are "
                f"{height}x{width}"
            )
        first, second = parameters.channels
        padding = parameters.kernel_size // 2
        self.conv1 = nn.Conv2d(channels, first, parameters.kernel_size, padding=padding)
        self.conv2 = nn.Conv2d(first, second, parameters.kernel_size, padding=padding)
        self.bn1 = nn.BatchNorm2d(first) if parameters.batch_norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(second) if parameters.batch_norm else nn.Identity()
        grown = 2 - parameters.kernel_size % 2 * 2  # an even kernel adds a pixel at each convolution
        pixels = ((height + grown) // 2) * ((width + grown) // 2)
        self.fc1 = nn.Linear(second * pixels, parameters.hidden)
        self.dropout = nn.Dropout(parameters.dropout)
        self.fc2 = nn.Linear(parameters.hidden, data.outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits or values, (batch, outputs)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        hidden = functional.max_pool2d(hidden, 2).flatten(1)
        hidden = self.dropout(functional.relu(self.fc1(hidden)))
        return self.fc2(hidden)  # type: ignore[no-any-return]  # modules are untyped


@register_model(
    "cnn",
    CnnParameters,
    summary="Two convolutions and two linear layers (conv1, conv2, fc1, fc2) over small images.",
    inputs=(InputKind.IMAGE,),
    tasks=(Task.CLASSIFICATION, Task.REGRESSION),
    convolutional=True,
)
def build_cnn(parameters: CnnParameters, data: DataInfo) -> nn.Module:
    """A small convolutional network."""
    return Cnn(parameters, data)
