"""Component names and parameters of a spec, checked against what the workers published, without torch.

The catalogue maps (kind, name) to a component with the JSON Schema (Draft 2020-12) of its parameters. Loading
it and deciding what an empty one means are `submission`'s.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from referencing import Registry

from halfstep.service.api.requests.pointers import pointer, suggestion
from halfstep.service.contract.components import COMPONENT_KINDS, DEFAULT_LOSS
from halfstep.service.contract.documents import with_integers
from halfstep.service.contract.spec import ComponentRef, JobSpec
from halfstep.service.errors import FieldProblem
from halfstep.service.store.fleet.components import ComponentInfo

Catalogue = Mapping[tuple[str, str], ComponentInfo]

_MOST_PROBLEMS = 20
_MOST_VALIDATORS = 1000
_MOST_PASSED = 100
_LONGEST_PASSED = 1000


@dataclass(frozen=True, slots=True)
class _Checker:
    """A schema, its validator, and parameters in which it found nothing, as JSON.

    Most jobs name components with the parameters of jobs before them, and to check them takes far longer
    than to spell them.
    """

    schema: dict[str, Any]
    validator: Draft202012Validator
    passed: set[str] = field(default_factory=set)

    def remember(self, params: str) -> None:
        if len(params) > _LONGEST_PASSED:
            return
        if len(self.passed) >= _MOST_PASSED:
            self.passed.clear()
        self.passed.add(params)


# By the identity of a schema, which is kept beside its validator so that no other can take it over.
_checkers: dict[int, _Checker] = {}
_log = structlog.get_logger(__name__)


def components_of(spec: JobSpec) -> Iterator[tuple[str, ComponentRef]]:
    """Each component that `spec` names, with its kind."""
    for kind in COMPONENT_KINDS:
        reference = getattr(spec, kind)
        if reference is not None:
            yield kind, reference


def check_components(spec: JobSpec, catalogue: Catalogue) -> list[FieldProblem]:
    """What is wrong with the components that `spec` names; empty when nothing is."""
    problems: list[FieldProblem] = []
    for kind, reference in components_of(spec):
        component = catalogue.get((kind, reference.name))
        if component is None:
            names = [name for known, name in catalogue if known == kind]
            detail = (
                f"is no registered {kind}; {suggestion(reference.name, names)} (GET /components lists them)"
            )
            problems.append(FieldProblem(pointer(kind, "name"), detail))
        else:
            problems += _check_params(kind, reference, component)
    return problems


def with_defaults(spec: JobSpec, catalogue: Catalogue) -> JobSpec:
    """`spec` with what it leaves open filled in: the loss, the epochs, and the components' own defaults."""
    blocks: dict[str, Any] = dict(components_of(spec))
    if spec.loss is None:
        dataset = catalogue.get(("dataset", spec.dataset.name))
        name = DEFAULT_LOSS.get(str(dataset.extra.get("task"))) if dataset is not None else None
        if name is not None and ("loss", name) in catalogue:
            blocks["loss"] = ComponentRef(name=name)
    for kind, reference in blocks.items():
        component = catalogue.get((kind, reference.name))
        if component is not None:
            blocks[kind] = _with_default_params(kind, reference, component)
    if spec.training.epochs != spec.epochs:
        blocks["training"] = spec.training.model_copy(update={"epochs": spec.epochs})
    return spec.model_copy(update=blocks)


def _with_default_params(kind: str, reference: ComponentRef, component: ComponentInfo) -> ComponentRef:
    properties = component.schema.get("properties", {})
    defaults = {
        name: schema["default"]
        for name, schema in properties.items()
        if isinstance(schema, dict) and "default" in schema and name not in reference.params
    }
    try:
        params = with_integers(reference.params, component.schema)
    except Exception:  # noqa: BLE001  # a schema that is not ours, as in _check_params, which tells of it
        params = reference.params
    reference = reference.model_copy(update={"params": params})
    if not defaults:
        return reference
    filled = reference.model_copy(update={"params": {**params, **defaults}})
    # Defaults that exclude each other are the component's to choose from.
    return reference if _check_params(kind, filled, component) else filled


def _check_params(kind: str, reference: ComponentRef, component: ComponentInfo) -> list[FieldProblem]:
    problems: list[FieldProblem] = []
    try:
        checker = _checker(component.schema)
        params = json.dumps(reference.params)
        if params in checker.passed:
            return []
        for error in checker.validator.iter_errors(reference.params):
            problems += _param_problems((kind, "params"), error)
            if len(problems) >= _MOST_PROBLEMS:
                break
    except Exception as error:  # noqa: BLE001  # the schema is not ours: it can fail in any way it likes
        # The worker checks the parameters again when it builds the component.
        _log.warning("component_schema_unusable", kind=kind, name=component.name, error=str(error))
        return []
    if not problems:
        checker.remember(params)
    return problems[:_MOST_PROBLEMS]


def _checker(schema: dict[str, Any]) -> _Checker:
    held = _checkers.get(id(schema))
    if held is None:
        if len(_checkers) >= _MOST_VALIDATORS:
            _checkers.clear()
        # An empty registry: a published schema may refer to itself, never to the network.
        held = _checkers[id(schema)] = _Checker(schema, Draft202012Validator(schema, registry=Registry()))
    return held


def _param_problems(base: tuple[str, ...], error: ValidationError) -> list[FieldProblem]:
    keyword = str(error.validator)
    wanted = error.validator_value
    if keyword in {"anyOf", "oneOf"} and error.context:
        deepest = best_match(error.context)
        if deepest is not None and deepest.absolute_path != error.absolute_path:
            return _param_problems(base, deepest)
        choices = [choice for choice in map(_short_need, error.context) if choice]
        path = (*base, *error.absolute_path)
        return [FieldProblem(pointer(*path), "must " + " or ".join(dict.fromkeys(choices)))]
    path = (*base, *error.absolute_path)
    if keyword == "additionalProperties" and wanted is False and isinstance(error.instance, dict):
        properties = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
        unknown = [name for name in error.instance if name not in properties]
        return [
            FieldProblem(
                pointer(*path, name), f"is no parameter of this component; {suggestion(name, properties)}"
            )
            for name in unknown
        ]
    if keyword == "required" and isinstance(error.instance, dict) and isinstance(wanted, list):
        missing = [name for name in wanted if name not in error.instance]
        return [FieldProblem(pointer(*path, name), "is required") for name in missing]
    return [FieldProblem(pointer(*path), f"must {_short_need(error)}")]


_NEEDS = {
    "type": "be of type {}",
    "enum": "be one of {}",
    "const": "be {}",
    "minimum": "be at least {}",
    "maximum": "be at most {}",
    "exclusiveMinimum": "be greater than {}",
    "exclusiveMaximum": "be less than {}",
    "multipleOf": "be a multiple of {}",
    "minLength": "have at least {} characters",
    "maxLength": "have at most {} characters",
    "pattern": "match the pattern {}",
    "minItems": "have at least {} items",
    "maxItems": "have at most {} items",
    "minProperties": "have at least {} members",
    "maxProperties": "have at most {} members",
    "uniqueItems": "have no item twice",
}


def _short_need(error: ValidationError) -> str:
    """What the schema asks for, from the schema alone: jsonschema's own message repeats the input."""
    keyword = str(error.validator)
    wanted = error.validator_value
    template = _NEEDS.get(keyword, f"satisfy the schema's '{keyword}'")
    if isinstance(wanted, list):
        wanted = (
            " or ".join(str(choice) for choice in wanted)
            if keyword == "type"
            else ", ".join(map(repr, wanted))
        )
    return template.format(wanted)
