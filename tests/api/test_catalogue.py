"""Components of a spec against a published catalogue."""

from typing import Any

import pytest

from halfstep.service.api.submitting.components import check_components, with_defaults
from halfstep.service.contract.spec import JobSpec
from halfstep.service.store.fleet.components import ComponentInfo

from .catalogue import CATALOGUE


def spec_of(**blocks: Any) -> JobSpec:
    return JobSpec.model_validate({"model": {"name": "mlp"}, "dataset": {"name": "digits"}, **blocks})


def problems(**blocks: Any) -> list[tuple[str, str]]:
    return [(found.pointer, found.detail) for found in check_components(spec_of(**blocks), CATALOGUE)]


def test_known_components_pass() -> None:
    assert problems(scheduler={"name": "step_lr", "params": {"step_size": 5}}) == []


def test_what_passed_is_told_from_what_only_equals_it() -> None:
    def of(hidden: list[object]) -> list[tuple[str, str]]:
        return problems(model={"name": "mlp", "params": {"hidden": hidden}})

    assert of([1]) == of([1]) == []
    assert of([True]) != []
    assert of([1]) == []


@pytest.mark.parametrize(
    ("blocks", "place", "remedy"),
    [
        ({"model": {"name": "mpl"}}, "/model/name", "is no registered model; did you mean 'mlp'?"),
        (
            {"dataset": {"name": "mlp"}},
            "/dataset/name",
            "is no registered dataset; known: 'digits', 'house_prices'",
        ),
        (
            {"model": {"name": "mlp", "params": {"hiden": []}}},
            "/model/params/hiden",
            "did you mean 'hidden'?",
        ),
        (
            {"model": {"name": "mlp", "params": {"hidden": 5}}},
            "/model/params/hidden",
            "must be of type array",
        ),
        (
            {"model": {"name": "mlp", "params": {"hidden": [8, "x"]}}},
            "/model/params/hidden/1",
            "of type integer",
        ),
        (
            {"model": {"name": "mlp", "params": {"hidden": [8, True]}}},
            "/model/params/hidden/1",
            "of type integer",
        ),
        (
            {"model": {"name": "mlp", "params": {"hidden": [0]}}},
            "/model/params/hidden/0",
            "must be at least 1",
        ),
        (
            {"model": {"name": "mlp", "params": {"activation": "s3cr3t"}}},
            "/model/params/activation",
            "'relu', 'gelu'",
        ),
        (
            {"optimizer": {"name": "adamw", "params": {"lr": 0}}},
            "/optimizer/params/lr",
            "must be greater than 0",
        ),
        ({"scheduler": {"name": "step_lr"}}, "/scheduler/params/step_size", "is required"),
        (
            {"optimizer": {"name": "adamw", "params": {"betas": [0.9]}}},
            "/optimizer/params/betas",
            "at least 2 items",
        ),
        (
            {"optimizer": {"name": "adamw", "params": {"eps": "x"}}},
            "/optimizer/params/eps",
            "number or be of type null",
        ),
    ],
)
def test_a_wrong_component_or_parameter_is_pointed_at(
    blocks: dict[str, Any], place: str, remedy: str
) -> None:
    found = problems(**blocks)
    assert [entry[0] for entry in found] == [place]
    assert remedy in found[0][1]
    assert "s3cr3t" not in found[0][1]


def test_a_schema_that_cannot_be_used_leaves_the_check_to_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, *_args, **_more: fetched.append(request))
    for broken in (
        {"$ref": "https://schemas.invalid/params.json"},
        {"type": 7},
        {"properties": {"hidden": {"pattern": "("}}},
        {"$ref": "#/$defs/missing"},
    ):
        catalogue = {**CATALOGUE, ("model", "mlp"): ComponentInfo("model", "mlp", "", broken, {})}
        assert check_components(spec_of(model={"name": "mlp", "params": {"hidden": "x"}}), catalogue) == []
    assert fetched == [], "a published schema makes this process fetch nothing"


def test_defaults_are_filled_in() -> None:
    filled = with_defaults(spec_of(), CATALOGUE)
    assert filled.loss is not None
    assert filled.loss.name == "cross_entropy"
    assert filled.training.epochs == 1
    assert filled.model.params == {"hidden": [512], "activation": "relu"}
    # What the author wrote stays as it was written.
    mine = with_defaults(
        spec_of(model={"name": "mlp", "params": {"hidden": [4]}}, training={"max_steps": 9}), CATALOGUE
    )
    assert mine.model.params == {"hidden": [4], "activation": "relu"}
    assert mine.training.epochs is None


def test_the_loss_follows_the_task() -> None:
    filled = with_defaults(spec_of(dataset={"name": "house_prices"}), CATALOGUE)
    assert filled.loss is not None
    assert filled.loss.name == "mse"
    chosen = with_defaults(spec_of(loss={"name": "mse"}), CATALOGUE)
    assert chosen.loss is not None
    assert chosen.loss.name == "mse"
    assert with_defaults(spec_of(), {}).loss is None


def test_defaults_that_exclude_each_other_are_not_filled_in() -> None:
    schema = {"properties": {"a": {"default": 1}, "b": {"default": 1}}, "not": {"required": ["a", "b"]}}
    catalogue = {**CATALOGUE, ("model", "mlp"): ComponentInfo("model", "mlp", "", schema, {})}
    assert with_defaults(spec_of(model={"name": "mlp", "params": {"a": 2}}), catalogue).model.params == {
        "a": 2
    }
