"""The registry, and every component that ships with it."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch.optim import Optimizer

from halfstep.worker.training import components
from halfstep.worker.training.components import (
    Component,
    DataInfo,
    InputKind,
    Kind,
    Length,
    NoParameters,
    Parameters,
    Task,
    catalogue,
    find,
    load_entry_points,
    load_modules,
    register_loss,
    registry,
)
from halfstep.worker.training.errors import InvalidComponent

REQUIRED: dict[str, dict[str, Any]] = {
    "step_lr": {"step_size": 2},
    "reduce_on_plateau": {"patience": 1},
    "multi_step": {"milestones": [2, 4]},
    "exponential": {"gamma": 0.9},
    "cosine_warm_restarts": {"first": 3},
    "one_cycle": {"max_lr": 0.1},
    "cyclic": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 3},
    "warmup_cosine": {"warmup": 3},
}


def of_kind(kind: Kind) -> list[Component]:
    return [component for component in catalogue() if component.kind is kind]


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_built_in()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.parametrize("component", catalogue(), ids=lambda c: f"{c.kind}-{c.name}")
def test_every_component_has_a_valid_schema_and_help(component: Component) -> None:
    jsonschema.Draft202012Validator.check_schema(component.schema)
    assert component.schema["additionalProperties"] is False
    assert component.help.endswith(".")
    assert "\n" not in component.help
    undescribed = [
        name for name, field in component.schema["properties"].items() if "description" not in field
    ]
    assert undescribed == []
    jsonschema.Draft202012Validator(component.schema).validate(REQUIRED.get(component.name, {}))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(component.schema).validate({"no_such_parameter": 1})


def test_the_catalogue_holds_what_is_promised() -> None:
    names = {(str(component.kind), component.name) for component in catalogue()}
    promised = {
        "model": "mlp cnn gpt",
        "dataset": "digits text synthetic",
        "loss": "cross_entropy mse l1 huber smooth_l1",
        "optimizer": "sgd adam adamw adagrad rmsprop",
        "scheduler": "step_lr multi_step exponential cosine cosine_warm_restarts linear one_cycle "
        "warmup_cosine reduce_on_plateau",
    }
    for kind, listed in promised.items():
        assert {(kind, name) for name in listed.split()} <= names
    assert len(names) == len(catalogue())


def test_the_layers_of_cnn_are_called_by_their_names() -> None:
    entry = find(Kind.MODEL, "cnn")
    info = DataInfo(task=Task.CLASSIFICATION, inputs=InputKind.IMAGE, shape=(1, 8, 8), outputs=10)
    model = entry.build(entry.parse({}), info)
    named = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert named == {"conv1", "conv2", "fc1", "fc2"}


@pytest.mark.parametrize("kernel_size", range(1, 8))
@pytest.mark.parametrize("edge", [2, 5, 8])
def test_cnn_takes_any_kernel_and_image(kernel_size: int, edge: int) -> None:
    entry = find(Kind.MODEL, "cnn")
    info = DataInfo(task=Task.CLASSIFICATION, inputs=InputKind.IMAGE, shape=(2, edge, edge), outputs=3)
    model = entry.build(entry.parse({"kernel_size": kernel_size, "batch_norm": True}), info)
    assert model(torch.rand(2, 2, edge, edge)).shape == (2, 3)


@pytest.mark.parametrize("component", of_kind(Kind.OPTIMIZER), ids=lambda c: c.name)
def test_every_optimizer_steps_and_its_state_is_loadable(component: Component, tmp_path: Path) -> None:
    entry = find(Kind.OPTIMIZER, component.name)
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer: Optimizer = entry.build(entry.parse({}), [weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(4, 4))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)


@pytest.mark.parametrize("component", of_kind(Kind.SCHEDULER), ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # no step is taken here
def test_every_scheduler_runs_its_length_and_its_state_is_loadable(
    component: Component, tmp_path: Path
) -> None:
    entry = find(Kind.SCHEDULER, component.name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = entry.build(entry.parse(REQUIRED.get(component.name, {})), optimizer, Length(12, "step"))
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(*([1.0] if component.extra["needs_evaluation"] else []))
    assert all(0 <= rate <= 0.1 for rate in rates)
    assert len(set(rates)) > 1
    torch.save(scheduler.state_dict(), tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # as above
def test_warmup_cosine_rises_then_falls_to_its_floor() -> None:
    entry = find(Kind.SCHEDULER, "warmup_cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = entry.build(entry.parse({"warmup": 3, "min_factor": 0.1}), optimizer, Length(13, "step"))
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[13:] == [pytest.approx(0.1)] * 3


@pytest.mark.parametrize(
    ("kind", "name", "params", "length"),
    [
        (Kind.SCHEDULER, "cosine", {}, Length(None, "step")),
        (Kind.SCHEDULER, "one_cycle", {"max_lr": 1.0, "total": 5}, Length(6, "step")),
        (Kind.SCHEDULER, "warmup_cosine", {"warmup": 6}, Length(6, "step")),
    ],
)
def test_a_schedule_that_does_not_fit_the_job_is_refused(
    kind: Kind, name: str, params: dict[str, Any], length: Length
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    entry = find(kind, name)
    with pytest.raises(InvalidComponent, match=name):
        entry.build(entry.parse(params), optimizer, length)


@pytest.mark.parametrize(
    ("kind", "name", "params", "pointer"),
    [
        (Kind.MODEL, "mlp", {"hidden": [True]}, "/model/params/hidden/0"),
        (Kind.MODEL, "mlp", {"hidden": [0]}, "/model/params/hidden/0"),
        (Kind.MODEL, "mlp", {"dropout": "0.1"}, "/model/params/dropout"),
        (Kind.MODEL, "mlp", {"dropout": 1.0}, "/model/params/dropout"),
        (Kind.MODEL, "mlp", {"hiden": [4]}, "/model/params/hiden"),
        (Kind.MODEL, "gpt", {"width": 10, "heads": 4}, "/model/params"),
        (Kind.OPTIMIZER, "adamw", {"lr": float("nan")}, "/optimizer/params/lr"),
        (Kind.OPTIMIZER, "adamw", {"lr": -1}, "/optimizer/params/lr"),
        (Kind.OPTIMIZER, "adamw", {"betas": [0.9]}, "/optimizer/params/betas"),
        (Kind.OPTIMIZER, "sgd", {"nesterov": True}, "/optimizer/params"),
        (Kind.SCHEDULER, "step_lr", {}, "/scheduler/params/step_size"),
        (Kind.DATASET, "synthetic", {"task": "guessing"}, "/dataset/params/task"),
        (Kind.DATASET, "synthetic", {"outputs": 1}, "/dataset/params"),
    ],
)
def test_a_wrong_parameter_is_named(kind: Kind, name: str, params: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidComponent) as failure:
        find(kind, name).parse(params)
    [problem] = [p for p in failure.value.detail["errors"] if p["pointer"].startswith(pointer)]
    assert problem["pointer"] in failure.value.message


def test_an_integer_is_a_number() -> None:
    assert find(Kind.OPTIMIZER, "adamw").parse({"lr": 1, "betas": [0, 0]}) is not None


def test_an_unknown_name_lists_the_closest() -> None:
    with pytest.raises(InvalidComponent, match="use one of cosine"):
        find(Kind.SCHEDULER, "cosin")


@pytest.mark.usefixtures("_own_registry")
def test_two_components_of_one_name_are_refused() -> None:
    register = register_loss("mine", NoParameters, summary="Mine.", tasks=(Task.REGRESSION,))
    build = register(lambda _parameters, _data: None)
    assert register(build) is build
    with pytest.raises(InvalidComponent, match="registered twice"):
        register(lambda _parameters, _data: 1)


@pytest.mark.usefixtures("_own_registry")
def test_parameters_must_refuse_unknown_names() -> None:
    class Open(Parameters, extra="ignore"):
        """Takes anything."""

    with pytest.raises(InvalidComponent, match="must refuse unknown names"):
        register_loss("open", Open, summary="Open.", tasks=(Task.REGRESSION,))


MODULE = """
from halfstep.worker.training.components import NoParameters, Task, register_loss
@register_loss("{name}", NoParameters, summary="From a package.", tasks=(Task.REGRESSION,))
def build(_parameters, _data):
    return lambda output, target: (output - target).abs().mean()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _own_registry: None) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("brought_in", "broken_in"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "brought_in.py").write_text(MODULE.format(name="brought"))
    (tmp_path / "broken_in.py").write_text("import no_such_module_anywhere\n")
    return tmp_path


def offer(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])


@pytest.mark.usefixtures("package")
def test_entry_points_bring_components(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, EntryPoint("brought", "brought_in:build", "halfstep.losses"))
    assert load_entry_points() == ["loss/brought"]
    assert find(Kind.LOSS, "brought").component.help == "From a package."


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("point", "message"),
    [
        (EntryPoint("other", "brought_in:build", "halfstep.losses"), "registers no loss of that name"),
        (EntryPoint("brought", "brought_in:build", "halfstep.models"), "registers no model of that name"),
        (EntryPoint("broken", "broken_in:build", "halfstep.losses"), "no_such_module_anywhere"),
    ],
)
def test_an_entry_point_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, point: EntryPoint, message: str
) -> None:
    offer(monkeypatch, point)
    with pytest.raises(InvalidComponent, match=message):
        load_entry_points()


@pytest.mark.usefixtures("package")
def test_listed_modules_bring_components() -> None:
    load_modules(["brought_in"])
    assert find(Kind.LOSS, "brought")
    with pytest.raises(InvalidComponent, match="broken_in"):
        load_modules(["broken_in"])


def test_the_door_for_packages_is_exact() -> None:
    public = {
        name
        for name in vars(components)
        if not name.startswith("_") and name not in {"parameters", "registry"}
    }
    modules = {name for name in public if type(getattr(components, name)).__name__ == "module"}
    assert public - modules == set(components.__all__)
