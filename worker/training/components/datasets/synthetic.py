"""The dataset `synthetic`: seeded random samples of any size, with faults on demand.

For tests, benchmarks and first tries. Other datasets have their own files.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from halfstep.worker.training.components.parameters import (
    Count,
    NonNegative,
    Parameters,
    Positive,
    Seed,
    Width,
)
from halfstep.worker.training.components.registry import register_dataset
from halfstep.worker.training.data.dataset import (
    DataInfo,
    DataRequest,
    Dataset,
    InputKind,
    Task,
    TensorSplit,
    epoch_order,
)
from halfstep.worker.training.errors import DataError

Samples = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]


class SyntheticParameters(Parameters):
    """Parameters of `synthetic`."""

    task: Literal["classification", "regression"] = Field(
        default="classification", description="Classes of a random linear map, or its values."
    )
    samples: Samples = Field(default=1024, description="Training samples.")
    held_out_samples: Annotated[int, Field(strict=True, ge=0, le=10_000_000)] = Field(
        default=256, description="Held-out samples; 0: no evaluation."
    )
    features: Width = Field(
        default=16, description="Inputs of a sample; a square number can also be had as an image."
    )
    outputs: Width = Field(default=4, description="Classes, or regression targets.")
    noise: NonNegative = Field(
        default=0.1, description="Standard deviation of what is added to the map's values."
    )
    input_scale: Positive = Field(
        default=1.0, description="Factor on every input; a large one overflows FP16."
    )
    seed: Seed = Field(default=0, description="Of the data itself; the job's seed decides the order.")
    non_finite_steps: Annotated[tuple[Count, ...], Field(max_length=10_000)] = Field(
        default=(),
        description="Steps of the first epoch whose first sample is non-finite, as it stays later.",
    )
    non_finite_value: Literal["nan", "inf"] = Field(default="nan", description="What those samples hold.")

    @model_validator(mode="after")
    def _classes(self) -> "SyntheticParameters":
        if self.task == "classification" and self.outputs < 2:
            raise ValueError("outputs must be at least 2 for classification")
        return self


@register_dataset(
    "synthetic",
    SyntheticParameters,
    summary="Seeded random samples of a linear map, of any size, with non-finite samples on demand.",
    task=Task.CLASSIFICATION,
    task_parameter="task",
)
def build_synthetic(parameters: SyntheticParameters, request: DataRequest) -> Dataset:
    """Inputs (samples, features) or (samples, 1, edge, edge).

    Targets int64 (samples,) or float (samples, outputs).
    """
    task = Task(parameters.task)
    generator = torch.Generator().manual_seed(parameters.seed)
    total = parameters.samples + parameters.held_out_samples
    features = torch.randn(total, parameters.features, generator=generator)
    weights = (
        torch.randn(parameters.features, parameters.outputs, generator=generator) / parameters.features**0.5
    )
    values = features @ weights
    values = values + parameters.noise * torch.randn(values.shape, generator=generator)
    targets = values.argmax(dim=1) if task is Task.CLASSIFICATION else values
    edge = math.isqrt(parameters.features)
    offered = (
        (InputKind.FEATURES, InputKind.IMAGE) if edge**2 == parameters.features else (InputKind.FEATURES,)
    )
    inputs = request.choose(offered)
    shape = (1, edge, edge) if inputs is InputKind.IMAGE else (parameters.features,)
    features = (features * parameters.input_scale).reshape(total, *shape)
    _spoil(features, parameters, request)
    split = parameters.samples
    held_out = TensorSplit(features[split:], targets[split:]) if parameters.held_out_samples else None
    return Dataset(
        train=TensorSplit(features[:split], targets[:split]),
        held_out=held_out,
        info=DataInfo(task=task, inputs=inputs, shape=shape, outputs=parameters.outputs),
    )


def _spoil(features: Tensor, parameters: SyntheticParameters, request: DataRequest) -> None:
    if not parameters.non_finite_steps:
        return
    steps = math.ceil(parameters.samples / request.samples_per_step)
    if max(parameters.non_finite_steps) > steps:
        raise DataError(
            f"dataset 'synthetic': non_finite_steps names step {max(parameters.non_finite_steps)}, but an "
            f"epoch has {steps} steps",
            detail={"pointer": "/dataset/params/non_finite_steps"},
        )
    positions = torch.tensor([(step - 1) * request.samples_per_step for step in parameters.non_finite_steps])
    order = epoch_order(request.seed, 1, parameters.samples)
    features[order[positions]] = float(parameters.non_finite_value)
