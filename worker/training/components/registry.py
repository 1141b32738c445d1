"""The registry of components: what a job may name, how its parameters are checked, who builds it.

A component is a builder function with a model of its parameters. Builders of one kind share one signature:

    model      (parameters, data: DataInfo)             -> torch.nn.Module
    dataset    (parameters, request: DataRequest)       -> Dataset
    loss       (parameters, data: DataInfo)             -> callable (output, target) -> scalar tensor, a mean
    optimizer  (parameters, weights: list[Parameter])   -> torch.optim.Optimizer
    scheduler  (parameters, optimizer, length: Length)  -> torch.optim.lr_scheduler.LRScheduler

Packages register theirs through the entry-point groups `halfstep.models`, `.datasets`, `.losses`,
`.optimizers` and `.schedulers`: the entry point's object is the decorated builder and its name the registered
one. Modules that an operator lists are imported. No component is defined here.
"""

import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import entry_points
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from halfstep.worker.training.data.dataset import InputKind, Task
from halfstep.worker.training.errors import InvalidComponent


class Kind(StrEnum):
    """The five kinds of component, named as in a specification."""

    MODEL = "model"
    DATASET = "dataset"
    LOSS = "loss"
    OPTIMIZER = "optimizer"
    SCHEDULER = "scheduler"


ENTRY_POINT_GROUPS: Mapping[Kind, str] = {
    Kind.MODEL: "halfstep.models",
    Kind.DATASET: "halfstep.datasets",
    Kind.LOSS: "halfstep.losses",
    Kind.OPTIMIZER: "halfstep.optimizers",
    Kind.SCHEDULER: "halfstep.schedulers",
}

_BUILT_IN = (
    "models.mlp",
    "models.cnn",
    "models.gpt",
    "datasets.digits",
    "datasets.text",
    "datasets.synthetic",
    "losses",
    "optimizers",
    "schedulers",
)

Builder = TypeVar("Builder", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Length:
    """How far a schedule runs: calls of its step() in the whole job, None where nothing bounds it."""

    total: int | None
    unit: str  # "step" or "epoch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """What a client may know of a component.

    Attributes:
        kind: which of the five kinds.
        name: what a specification calls it.
        help: one line.
        schema: JSON Schema (Draft 2020-12) of its parameters.
        extra: of a model `inputs`, `tasks` and `convolutional`, of a dataset `task` (and `task_parameter`,
            the parameter that can change it), of a loss `tasks`, of a scheduler `needs_evaluation`.
    """

    kind: Kind
    name: str
    help: str
    schema: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The component as JSON values."""
        return {
            "kind": str(self.kind),
            "name": self.name,
            "help": self.help,
            "schema": self.schema,
            "extra": self.extra,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A component with what builds it."""

    component: Component
    parameters: type[BaseModel]
    build: Callable[..., Any]
    sequence_length: Callable[[Any], int] | None = None

    def parse(self, params: Mapping[str, Any]) -> BaseModel:
        """Check parameters as they stand in a specification.

        Raises:
            InvalidComponent: with a line for every wrong parameter.
        """
        kind, name = self.component.kind, self.component.name
        try:
            return self.parameters.model_validate_json(json.dumps(dict(params)))
        except ValidationError as error:
            problems = [
                {
                    "pointer": "/".join(["", str(kind), "params", *map(str, problem["loc"])]),
                    "detail": problem["msg"],
                }
                for problem in error.errors(include_url=False, include_context=False, include_input=False)
            ]
            listed = "; ".join(f"{problem['pointer']}: {problem['detail']}" for problem in problems)
            raise InvalidComponent(
                f"the parameters of {kind} '{name}' are wrong: {listed}. "
                f"It takes {', '.join(self.parameters.model_fields) or 'none'}.",
                detail={"errors": problems},
            ) from None
        except TypeError as error:
            raise InvalidComponent(f"the parameters of {kind} '{name}' are not JSON: {error}") from None


_registered: dict[tuple[Kind, str], Registered] = {}


def register_model(
    name: str,
    parameters: type[BaseModel],
    *,
    summary: str,
    inputs: Iterable[InputKind],
    tasks: Iterable[Task],
    convolutional: bool = False,
    sequence_length: Callable[[Any], int] | None = None,
) -> Callable[[Builder], Builder]:
    """Register a builder of models that take `inputs` (most welcome first) and can learn `tasks`.

    `convolutional` says that convolutions are where the model's time goes, and not matrix products.
    `sequence_length` tells, from the parameters, how many tokens of context a model of sequences takes.
    """
    extra = {
        "inputs": [str(kind) for kind in inputs],
        "tasks": [str(task) for task in tasks],
        "convolutional": convolutional,
    }
    return _register(Kind.MODEL, name, parameters, summary, extra, sequence_length)


def register_dataset(
    name: str, parameters: type[BaseModel], *, summary: str, task: Task, task_parameter: str | None = None
) -> Callable[[Builder], Builder]:
    """Register a builder of datasets for `task`; `task_parameter` names the parameter that can change it."""
    extra: dict[str, Any] = {"task": str(task)}
    if task_parameter is not None:
        extra["task_parameter"] = task_parameter
    return _register(Kind.DATASET, name, parameters, summary, extra)


def register_loss(
    name: str, parameters: type[BaseModel], *, summary: str, tasks: Iterable[Task]
) -> Callable[[Builder], Builder]:
    """Register a builder of losses that fit `tasks`."""
    return _register(Kind.LOSS, name, parameters, summary, {"tasks": [str(task) for task in tasks]})


def register_optimizer(
    name: str, parameters: type[BaseModel], *, summary: str
) -> Callable[[Builder], Builder]:
    """Register a builder of optimizers."""
    return _register(Kind.OPTIMIZER, name, parameters, summary, {})


def register_scheduler(
    name: str, parameters: type[BaseModel], *, summary: str, needs_evaluation: bool = False
) -> Callable[[Builder], Builder]:
    """Register a builder of schedulers; one that `needs_evaluation` is stepped with the held-out loss."""
    return _register(Kind.SCHEDULER, name, parameters, summary, {"needs_evaluation": needs_evaluation})


def catalogue() -> list[Component]:
    """Every registered component, by kind and name."""
    load_built_in()
    return [entry.component for _, entry in sorted(_registered.items(), key=lambda item: item[0])]


def find(kind: Kind, name: str) -> Registered:
    """The component of that name.

    Raises:
        InvalidComponent: there is none; names the closest ones.
    """
    load_built_in()
    entry = _registered.get((kind, name))
    if entry is None:
        names = sorted(known for of_kind, known in _registered if of_kind is kind)
        close = difflib.get_close_matches(name, names, n=5) or names
        raise InvalidComponent(
            f"there is no {kind} '{name}' on this worker; use one of {', '.join(close)}",
            detail={"kind": str(kind), "name": name, "available": names},
        )
    return entry


def load_built_in() -> None:
    """Import the components of this package; a second call does nothing."""
    for module in _BUILT_IN:
        importlib.import_module(f"halfstep.worker.training.components.{module}")


def load_entry_points() -> list[str]:
    """Import what installed packages offer; returns the names loaded, as `kind/name`.

    Raises:
        InvalidComponent: an entry point cannot be imported, or registers nothing under its own name.
    """
    load_built_in()
    loaded = []
    for kind, group in ENTRY_POINT_GROUPS.items():
        for point in entry_points(group=group):
            try:
                point.load()
            except Exception as error:
                raise InvalidComponent(
                    f"the entry point '{point.name}' of {group} ({point.value}) cannot be imported: "
                    f"{error!r}; repair or remove the package that brings it"
                ) from error
            if (kind, point.name) not in _registered:
                raise InvalidComponent(
                    f"the entry point '{point.name}' of {group} ({point.value}) registers no {kind} of that "
                    f"name; decorate its builder with register_{kind}('{point.name}', …)"
                )
            loaded.append(f"{kind}/{point.name}")
    return loaded


def load_modules(names: Iterable[str]) -> None:
    """Import modules whose import registers components.

    Raises:
        InvalidComponent: a module cannot be imported.
    """
    load_built_in()
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise InvalidComponent(
                f"the component module '{name}' cannot be imported: {error!r}; correct the setting or the "
                "module"
            ) from error


def _register(
    kind: Kind,
    name: str,
    parameters: type[BaseModel],
    summary: str,
    extra: dict[str, Any],
    sequence_length: Callable[[Any], int] | None = None,
) -> Callable[[Builder], Builder]:
    if parameters.model_config.get("extra") != "forbid":
        raise InvalidComponent(
            f"the parameters of {kind} '{name}' must refuse unknown names: derive {parameters.__name__} from "
            "halfstep.components.Parameters"
        )
    component = Component(
        kind=kind, name=name, help=summary, schema=parameters.model_json_schema(), extra=extra
    )

    def decorate(build: Builder) -> Builder:
        known = _registered.get((kind, name))
        if known is not None and known.build is not build:
            raise InvalidComponent(
                f"{kind} '{name}' is registered twice, by {known.build.__module__} and {build.__module__}; "
                "rename one of them"
            )
        _registered[kind, name] = Registered(
            component=component, parameters=parameters, build=build, sequence_length=sequence_length
        )
        return build

    return decorate
