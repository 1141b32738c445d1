"""From a job's specification to the objects that train: components found, built and matched.

Everything that can be known to be wrong before the first step is found here, with a sentence that names both
sides and the remedy. No step is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.service.contract.components import DEFAULT_LOSS
from halfstep.service.contract.spec import ComponentRef, JobSpec
from halfstep.worker.training.components import (
    DataInfo,
    DataRequest,
    Dataset,
    InputKind,
    Kind,
    Length,
    Registered,
    Task,
    catalogue,
    find,
)
from halfstep.worker.training.data.batches import fetch
from halfstep.worker.training.data.plan import Plan
from halfstep.worker.training.errors import ComponentFailed, DataError, InvalidComponent, TrainingFailure
from halfstep.worker.training.failures import ran_out_of_host_memory

Criterion = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Everything that a job trains with, on its device."""

    model: nn.Module
    dataset: Dataset
    criterion: Criterion
    optimizer: Optimizer
    scheduler: Any
    scheduler_interval: Literal["epoch", "step"]
    scheduler_needs_evaluation: bool
    plan: Plan


def assemble(
    spec: JobSpec, device: torch.device, text_roots: Sequence[Path], plan_of: Callable[[int], Plan]
) -> Assembly:
    """Build the components that a specification names.

    The model's weights come from torch's global generator, which the caller has seeded.

    Raises:
        InvalidComponent, DataError, ComponentFailed: with the component and the remedy.
    """
    model_entry = find(Kind.MODEL, spec.model.name)
    dataset_entry = find(Kind.DATASET, spec.dataset.name)
    model_parameters = model_entry.parse(spec.model.params)
    sequence_length = model_entry.sequence_length
    request = DataRequest(
        inputs=[InputKind(kind) for kind in model_entry.component.extra["inputs"]],
        sequence_length=sequence_length(model_parameters) if sequence_length else None,
        text_roots=text_roots,
        seed=spec.training.seed,
        samples_per_step=spec.training.batch_size * spec.training.gradient_accumulation_steps,
    )
    dataset = _built(Dataset, dataset_entry, dataset_entry.parse(spec.dataset.params), request)
    _require_fit(model_entry, dataset_entry, dataset.info)
    model = _built(nn.Module, model_entry, model_parameters, dataset.info).to(device)
    loss = spec.loss or ComponentRef(name=DEFAULT_LOSS[dataset.info.task.value])
    criterion = _criterion(loss, spec.dataset.name, dataset.info)
    _require_output(spec.model.name, model, dataset, device)
    plan = plan_of(len(dataset.train))
    optimizer = _optimizer(spec, model)
    needs_evaluation, scheduler = _scheduler(spec, optimizer, plan, has_held_out=dataset.held_out is not None)
    return Assembly(
        model=model,
        dataset=dataset,
        criterion=criterion,
        optimizer=optimizer,
        scheduler=scheduler,
        scheduler_interval=spec.scheduler.interval if spec.scheduler else "epoch",
        scheduler_needs_evaluation=needs_evaluation,
        plan=plan,
    )


def _criterion(ref: ComponentRef, dataset_name: str, info: DataInfo) -> Criterion:
    entry = find(Kind.LOSS, ref.name)
    tasks = entry.component.extra["tasks"]
    if info.task not in tasks:
        fitting = _names(Kind.LOSS, lambda extra: info.task in extra["tasks"])
        raise InvalidComponent(
            f"loss '{ref.name}' is for {' and '.join(tasks)}, but dataset '{dataset_name}' is for "
            f"{info.task}; use one of {', '.join(fitting)}, or leave loss out",
            detail={"pointer": "/loss/name"},
        )
    criterion: Criterion = _built(object, entry, entry.parse(ref.params), info)
    return criterion


def _optimizer(spec: JobSpec, model: nn.Module) -> Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise InvalidComponent(
            f"model '{spec.model.name}' has no trainable parameters; give it at least one layer that learns",
            detail={"pointer": "/model"},
        )
    entry = find(Kind.OPTIMIZER, spec.optimizer.name)
    optimizer: Optimizer = _built(Optimizer, entry, entry.parse(spec.optimizer.params), weights)
    return optimizer


def _scheduler(spec: JobSpec, optimizer: Optimizer, plan: Plan, *, has_held_out: bool) -> tuple[bool, Any]:
    if spec.scheduler is None:
        return False, None
    entry = find(Kind.SCHEDULER, spec.scheduler.name)
    needs_evaluation = bool(entry.component.extra["needs_evaluation"])
    if needs_evaluation and not has_held_out:
        raise InvalidComponent(
            f"scheduler '{spec.scheduler.name}' follows the held-out loss, and dataset "
            f"'{spec.dataset.name}' holds nothing out; use another scheduler, or hold samples out",
            detail={"pointer": "/scheduler/name"},
        )
    by_step = spec.scheduler.interval == "step"
    length = Length(plan.total_steps if by_step else plan.total_epochs, spec.scheduler.interval)
    scheduler = _built(object, entry, entry.parse(spec.scheduler.params), optimizer, length)
    return needs_evaluation, scheduler


def _require_fit(model: Registered, dataset: Registered, info: DataInfo) -> None:
    model_name, dataset_name = model.component.name, dataset.component.name
    inputs, tasks = model.component.extra["inputs"], model.component.extra["tasks"]
    if info.inputs not in inputs:
        fitting = _names(Kind.MODEL, lambda extra: info.inputs in extra["inputs"])
        raise InvalidComponent(
            f"model '{model_name}' takes {' or '.join(inputs)}, but dataset '{dataset_name}' gives "
            f"{info.inputs} of shape {list(info.shape)}; use a model for them "
            f"({', '.join(fitting) or 'none is registered'}) or another dataset",
            detail={"pointer": "/model/name"},
        )
    if info.task not in tasks:
        fitting = _names(Kind.MODEL, lambda extra: info.task in extra["tasks"])
        raise InvalidComponent(
            f"model '{model_name}' learns {' or '.join(tasks)}, but dataset '{dataset_name}' is for "
            f"{info.task}; use a model for it ({', '.join(fitting) or 'none is registered'}) or another "
            "dataset",
            detail={"pointer": "/model/name"},
        )


def _require_output(name: str, model: nn.Module, dataset: Dataset, device: torch.device) -> None:
    """One sample through the model, without a trace: a wrong shape is said now, in words."""
    info = dataset.info
    inputs, _ = fetch(dataset.train, torch.zeros(1, dtype=torch.int64, device=dataset.train.device))
    if not isinstance(inputs, Tensor):
        return
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            output = model(inputs.to(device))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InvalidComponent(
                f"model '{name}' cannot take a sample of shape {list(inputs.shape[1:])} from the dataset: "
                f"{error}; change the model's parameters or the dataset",
                detail={"pointer": "/model"},
            ) from error
        finally:
            model.train(was_training)
    leading = tuple(inputs.shape) if info.task is Task.LANGUAGE else (1,)
    expected = (*leading, info.outputs)
    if isinstance(output, Tensor) and tuple(output.shape) != expected:
        raise InvalidComponent(
            f"model '{name}' gives an output of shape {list(output.shape)} for one sample, but {info.task} "
            f"needs {list(expected)}; change the model's last layer",
            detail={"pointer": "/model"},
        )


def _built(kind: type[Any], entry: Registered, *arguments: Any) -> Any:
    component = entry.component
    what = f"{component.kind} '{component.name}'"
    pointer = {"pointer": f"/{component.kind}"}
    try:
        built = entry.build(*arguments)
    except (TrainingFailure, MemoryError, torch.OutOfMemoryError):
        raise
    except ValueError as error:
        failure = DataError if component.kind is Kind.DATASET else InvalidComponent
        raise failure(
            f"{what} refuses its parameters: {error}; correct them in the specification", detail=pointer
        ) from error
    except Exception as error:
        if ran_out_of_host_memory(error):
            raise
        if isinstance(error, OSError) and component.kind is Kind.DATASET:
            raise DataError(f"{what} cannot be read: {error}; check its files", detail=pointer) from error
        raise ComponentFailed(
            f"{what} could not be built: {error!r}; this is an error in the component's own code",
            detail=pointer,
        ) from error
    if not isinstance(built, kind):
        raise ComponentFailed(
            f"{what} built a {type(built).__name__} where a {kind.__name__} is needed; correct the component",
            detail=pointer,
        )
    return built


def _names(kind: Kind, fits: Callable[[Mapping[str, Any]], bool]) -> list[str]:
    return [component.name for component in catalogue() if component.kind is kind and fits(component.extra)]
