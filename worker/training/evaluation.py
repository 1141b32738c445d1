"""One pass over the held-out split.

Its loss and the metrics of its task. Nothing of the training changes by it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfstep.service.contract.metrics import Evaluation
from halfstep.worker.amp.batches import to_device
from halfstep.worker.training.assembly import Criterion
from halfstep.worker.training.data.batches import fetch
from halfstep.worker.training.data.dataset import Dataset, Split, Task

Forward = Callable[[Any], Any]


def evaluate(
    dataset: Dataset,
    criterion: Criterion,
    region: AbstractContextManager[Forward],
    *,
    step: int,
    batch_size: int,
    device: torch.device,
) -> Evaluation:
    """Every held-out sample once, in order.

    Args:
        dataset: whose held-out split is read; it must have one.
        criterion: the job's own loss, a mean over its batch.
        region: the engine's evaluation region, which gives the model's forward pass and moves its inputs.
        step: optimizer steps taken so far.
        batch_size: samples of a batch; the last one may be shorter.
        device: where the model is.
    """
    split = dataset.held_out
    if split is None:
        raise ValueError("the dataset holds nothing out, so there is nothing to evaluate")
    started = time.perf_counter()
    # Sums stay on the device in float64: one read at the end, and the order of batches decides no digit that
    # shows.
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    metric_sum = torch.zeros((), dtype=torch.float64, device=device)
    metric_of = _METRICS[dataset.info.task]
    with region as forward:
        for inputs, targets in _batches(split, batch_size):
            wanted = to_device(targets, device)
            output = forward(inputs)
            loss_sum += criterion(output, wanted).double() * len(targets)
            metric_sum += metric_of(output, wanted).double() * len(targets)
        loss, metric = (torch.stack([loss_sum, metric_sum]) / len(split)).tolist()
    return Evaluation(
        step=step,
        split=dataset.held_out_name,
        loss=loss,
        metrics=_named(dataset.info.task, metric),
        seconds=time.perf_counter() - started,
    )


def _batches(split: Split, batch_size: int) -> Iterator[tuple[Any, Any]]:
    indices = torch.arange(len(split), device=split.device)
    for start in range(0, len(split), batch_size):
        yield fetch(split, indices[start : start + batch_size])


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=-1) == target).float().mean()


def _absolute_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target).abs().mean()


def _negative_log_likelihood(output: Tensor, target: Tensor) -> Tensor:
    # Not the job's loss: label smoothing must not move the perplexity.
    return functional.cross_entropy(output.float().flatten(0, 1), target.flatten())


_METRICS: dict[Task, Callable[[Tensor, Tensor], Tensor]] = {
    Task.CLASSIFICATION: _accuracy,
    Task.REGRESSION: _absolute_error,
    Task.LANGUAGE: _negative_log_likelihood,
}


def _named(task: Task, value: float) -> dict[str, float]:
    if task is Task.CLASSIFICATION:
        return {"accuracy": value}
    if task is Task.REGRESSION:
        return {"mae": value}
    try:
        return {"perplexity": math.exp(value)}
    except OverflowError:
        return {"perplexity": math.inf}
