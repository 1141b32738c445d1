"""A document to a JobSpec: every wrong place has its pointer and its remedy, and no input comes back."""

from typing import Any

import pytest

from halfstep.service.api.requests.body import JsonBody
from halfstep.service.api.requests.pointers import locate, pointer, suggestion
from halfstep.service.api.submitting.document import read_spec
from halfstep.service.contract.precision import SUPPORTED_MODES, MixedPrecisionMode
from halfstep.service.errors import InvalidRequest

MINIMAL: dict[str, Any] = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}}


def body_of(document: dict[str, Any]) -> JsonBody:
    return JsonBody(document=document, digest="", earlier_digest="")


def refused(**changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        read_spec(body_of({**MINIMAL, **changes}))
    return [(problem.pointer, problem.detail) for problem in caught.value.problems]


def test_a_minimal_document_is_a_spec() -> None:
    spec = read_spec(body_of(MINIMAL))
    assert (spec.model.name, spec.dataset.name, spec.training.batch_size) == ("mlp", "digits", 32)


@pytest.mark.parametrize(
    ("changes", "place", "remedy"),
    [
        ({"modell": {}}, "/modell", "did you mean 'model'?"),
        ({"training": {"batchsize": 3}}, "/training/batchsize", "did you mean 'batch_size'?"),
        ({"precision": {"initialscale": 3}}, "/precision/initialscale", "'initial_scale'"),
        (
            {"scheduler": {"name": "step_lr", "every": "x"}},
            "/scheduler/every",
            "known: 'interval', 'name', 'params'",
        ),
        ({"model": {}}, "/model/name", "is required"),
        ({"model": None}, "/model", "must be"),
        ({"model": "mlp"}, "/model", "must be"),
        ({"training": {"batch_size": "32"}}, "/training/batch_size", "must be a valid integer"),
        ({"training": {"batch_size": 32.5}}, "/training/batch_size", "must be a valid integer"),
        ({"training": {"batch_size": True}}, "/training/batch_size", "must be a valid integer"),
        ({"training": {"batch_size": 0}}, "/training/batch_size", "must be greater than or equal to 1"),
        ({"training": {"deterministic": 1}}, "/training/deterministic", "must be a valid boolean"),
        ({"training": {"max_steps": 2**60}}, "/training/max_steps", "must be less than or equal to"),
        ({"training": {"capture": "on"}}, "/training/capture", "'off' or 'auto'"),
        ({"training": {"compile": True}}, "/training/compile", "'off', 'default' or 'max-autotune'"),
        ({"training": {"compile": "default"}}, "/training/compile", "Set training.deterministic to false"),
        (
            {"training": {"deterministic": True, "compile": "max-autotune"}},
            "/training/compile",
            "or leave compile out",
        ),
        ({"precision": {"precision_level": "FP16"}}, "/precision/precision_level", "'fp16'"),
        ({"precision": {"mode": "auto"}}, "/precision/mode", "'automatic'"),
        ({"precision": {"mode": 7}}, "/precision/mode", "must be"),
        ({"precision": {"initial_scale": "65536"}}, "/precision/initial_scale", "must be a valid number"),
        (
            {"precision": {"selective_layers": ["a", 3]}},
            "/precision/selective_layers/1",
            "must be a valid string",
        ),
        ({"tags": {"a": 1}}, "/tags/a", "must be a valid string"),
        ({"tags": {"": "x"}}, "/tags/", "its name must have at least 1 character"),
        ({"tags": {str(number): "x" for number in range(33)}}, "/tags", "a job may carry 32"),
        ({"name": "a\nb"}, "/name", "holds U+000A, a character that cannot be seen"),
        ({"name": "a\u202eb"}, "/name", "holds U+202E"),
        ({"name": " "}, "/name", "is blank; it needs a character that can be seen"),
        ({"name": "a "}, "/name", "begins or ends with a blank; remove it"),
        ({"tags": {"a": "\x9b"}}, "/tags/a", "holds U+009B"),
        ({"tags": {"a\u2028": "b"}}, "/tags/a\u2028", "its name holds U+2028"),
    ],
)
def test_a_wrong_field_has_its_pointer_and_remedy(changes: dict[str, Any], place: str, remedy: str) -> None:
    found = refused(**changes)
    assert [problem[0] for problem in found] == [place]
    assert remedy in found[0][1]


@pytest.mark.parametrize(
    ("precision", "place"),
    [
        ({"mode": "gradient_scaling", "precision_level": "fp16"}, "/precision/precision_level"),
        ({"mode": "gradient_scaling", "precision_level": "bf16"}, "/precision/precision_level"),
        ({"mode": "gradient_scaling", "precision_level": "dynamic"}, "/precision/precision_level"),
        ({"mode": "gradient_scaling"}, "/precision/precision_level"),
        ({"gradient_scaling": False}, "/precision/gradient_scaling"),
        ({"min_scale": 4.0, "max_scale": 2.0}, "/precision/min_scale"),
        ({"initial_scale": 0.5}, "/precision/initial_scale"),
        ({"initial_scale": 2.0**25}, "/precision/initial_scale"),
        ({"initial_scale": 0}, "/precision/initial_scale"),
        ({"scale_factor": 1.0}, "/precision/scale_factor"),
        ({"scale_window": 0}, "/precision/scale_window"),
        ({"hysteresis": 0}, "/precision/hysteresis"),
        ({"max_consecutive_skips": 0}, "/precision/max_consecutive_skips"),
        ({"max_grad_norm": 0}, "/precision/max_grad_norm"),
        ({"max_scale": 2.0**128}, "/precision/max_scale"),
        ({"overflow_threshold": 1.0}, "/precision/overflow_threshold"),
        ({"underflow_threshold": 0}, "/precision/underflow_threshold"),
        ({"adaptive_threshold": 1.5}, "/precision/adaptive_threshold"),
        ({"logging_frequency": 0}, "/precision/logging_frequency"),
    ],
)
def test_a_contradiction_in_precision_points_at_its_field(precision: dict[str, Any], place: str) -> None:
    assert refused(precision=precision)[0][0] == place


@pytest.mark.parametrize("mode", ["manual", "selective", "adaptive"])
def test_a_mode_that_is_not_offered_names_those_that_are(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runnable = frozenset({MixedPrecisionMode.AUTOMATIC, MixedPrecisionMode.GRADIENT_SCALING})
    monkeypatch.setattr("halfstep.service.api.submitting.document.SUPPORTED_MODES", runnable)
    place, detail = refused(precision={"mode": mode})[0]
    assert place == "/precision/mode"
    assert "'automatic' and 'gradient_scaling'" in detail
    assert mode in detail


def test_every_mode_that_can_be_run_is_taken() -> None:
    for mode in SUPPORTED_MODES:
        level = "fp32" if mode is MixedPrecisionMode.GRADIENT_SCALING else "fp16"
        layers = ["conv1"] if mode is MixedPrecisionMode.SELECTIVE else []
        precision = {"mode": mode.value, "precision_level": level, "selective_layers": layers}
        assert read_spec(body_of({**MINIMAL, "precision": precision})).precision.mode is mode


def test_compiled_code_is_taken_where_nothing_promises_the_same_bits_and_captured_steps_anywhere() -> None:
    training = {"capture": "auto", "deterministic": True}
    assert read_spec(body_of({**MINIMAL, "training": training})).training.capture == "auto"
    training = {"capture": "auto", "compile": "max-autotune", "deterministic": False}
    assert read_spec(body_of({**MINIMAL, "training": training})).training.compile == "max-autotune"


def test_everything_wrong_is_told_at_once() -> None:
    found = refused(model={}, training={"epochs": 0, "seed": -1}, priority="high")
    assert [place for place, _ in found] == ["/model/name", "/training/epochs", "/training/seed", "/priority"]


def test_endless_mistakes_are_cut_off() -> None:
    assert len(refused(**{f"field_{number}": 1 for number in range(1000)})) == 50


def test_the_rejected_input_is_never_repeated() -> None:
    marker = "s3cr3t"
    for changes in (
        {"precision": {"mode": marker}},
        {"name": [marker]},
        {"training": {"seed": marker}},
        {"model": {"name": f"{marker} !"}},
        {"tags": {"a": marker + "\n"}},
    ):
        assert all(marker not in detail for _, detail in refused(**changes))


def test_pointers_escape_and_skip_what_no_document_holds() -> None:
    document = {"a/b": {"~": [1, {"x": 2}]}}
    assert pointer(*locate(document, ("a/b", "union-tag", "~", 1, "x", "[key]"))) == "/a~1b/~0/1/x"
    assert pointer(*locate(document, ("a/b", "new"), missing=True)) == "/a~1b/new"
    assert locate(document, ("a/b", "~", 7)) == ("a/b", "~")


def test_suggestions_are_close_or_complete() -> None:
    assert suggestion("epoch", ["epochs", "seed"]) == "did you mean 'epochs'?"
    assert suggestion("zzz", ["epochs", "seed"]) == "known: 'epochs', 'seed'"
    assert suggestion("zzz", [f"a{number}" for number in range(20)]).endswith("and 8 more")
    assert suggestion("zzz", []) == "nothing is allowed here"
