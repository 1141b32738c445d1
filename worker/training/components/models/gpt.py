"""The model `gpt`: a small byte-level transformer decoder. Other models have their own files."""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from halfstep.worker.training.components.parameters import Integer, Parameters, Share
from halfstep.worker.training.components.registry import register_model
from halfstep.worker.training.data.dataset import DataInfo, InputKind, Task


class GptParameters(Parameters):
    """Parameters of `gpt`."""

    layers: Annotated[Integer, Field(ge=1, le=128)] = Field(default=4, description="Transformer blocks.")
    heads: Annotated[Integer, Field(ge=1, le=256)] = Field(
        default=4, description="Attention heads; divides width."
    )
    width: Annotated[Integer, Field(ge=8, le=16_384)] = Field(
        default=128, description="Size of the residual stream."
    )
    context: Annotated[Integer, Field(ge=2, le=65_536)] = Field(
        default=128, description="Bytes seen at once."
    )
    dropout: Share = Field(
        default=0.0, description="Share dropped in attention, blocks and embeddings in training."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "GptParameters":
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; change one of them"
            )
        return self


class Attention(nn.Module):
    """Causal self-attention over (batch, sequence, width)."""

    def __init__(self, parameters: GptParameters) -> None:
        super().__init__()
        self.heads = parameters.heads
        self.dropout = parameters.dropout
        self.qkv = nn.Linear(parameters.width, 3 * parameters.width)
        self.proj = nn.Linear(parameters.width, parameters.width)

    def forward(self, stream: Tensor) -> Tensor:
        """Attended values, shaped like the input."""
        batch, sequence, width = stream.shape
        qkv = self.qkv(stream).view(batch, sequence, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj(attended.transpose(1, 2).reshape(batch, sequence, width))  # type: ignore[no-any-return]  # modules are untyped


class Block(nn.Module):
    """Attention and a feed-forward network, each on a normalised copy of the stream that it adds to."""

    def __init__(self, parameters: GptParameters) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(parameters.width)
        self.attn = Attention(parameters)
        self.ln2 = nn.LayerNorm(parameters.width)
        self.fc1 = nn.Linear(parameters.width, 4 * parameters.width)
        self.fc2 = nn.Linear(4 * parameters.width, parameters.width)
        self.drop = nn.Dropout(parameters.dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """The stream after this block."""
        stream = stream + self.drop(self.attn(self.ln1(stream)))
        hidden = functional.gelu(self.fc1(self.ln2(stream)))
        return stream + self.drop(self.fc2(hidden))  # type: ignore[no-any-return]  # modules are untyped


class Gpt(nn.Module):
    """Bytes in, logits of the next byte out.

    Input (batch, sequence) int64, output (batch, sequence, vocabulary).
    """

    def __init__(self, parameters: GptParameters, data: DataInfo) -> None:
        super().__init__()
        self.tokens = nn.Embedding(data.outputs, parameters.width)
        self.positions = nn.Embedding(parameters.context, parameters.width)
        self.drop = nn.Dropout(parameters.dropout)
        self.blocks = nn.ModuleList(Block(parameters) for _ in range(parameters.layers))
        self.ln = nn.LayerNorm(parameters.width)
        self.head = nn.Linear(parameters.width, data.outputs, bias=False)
        # GPT-2 draws weights with 0.02 at its width of 768; narrower ones need larger ones.
        std = 0.02 * (768 / parameters.width) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            # What the blocks add to the stream shrinks with the number of additions, as in GPT-2.
            adds = name.endswith(("attn.proj.weight", "fc2.weight"))
            nn.init.normal_(weight, std=std / (2 * parameters.layers) ** 0.5 if adds else std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for the byte after each position."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        stream = self.drop(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.ln(stream))  # type: ignore[no-any-return]  # modules are untyped


@register_model(
    "gpt",
    GptParameters,
    summary="Small byte-level transformer decoder for text.",
    inputs=(InputKind.TOKENS,),
    tasks=(Task.LANGUAGE,),
    sequence_length=lambda parameters: int(parameters.context),
)
def build_gpt(parameters: GptParameters, data: DataInfo) -> nn.Module:
    """A decoder over the data's vocabulary."""
    return Gpt(parameters, data)
