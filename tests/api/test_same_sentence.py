"""A contradictory precision is refused over HTTP with its field's pointer, in the library's own words."""

from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from halfstep.service.contract.precision import REFUSED_CELLS, MixedPrecisionConfig

from .conftest import SPEC

CONTRADICTIONS: list[dict[str, Any]] = [
    *({"mode": mode.value, "precision_level": level.value} for mode, level in REFUSED_CELLS),
    {"min_scale": 8.0, "max_scale": 4.0},
    {"initial_scale": 0.5},
    {"initial_scale": 2.0**25},
    {"gradient_scaling": False},
    {"gradient_scaling": False, "precision_level": "fp16"},
    {"mode": "gradient_scaling", "precision_level": "fp32", "gradient_scaling": False},
    {"mode": "selective", "precision_level": "bf16"},
]


@pytest.mark.parametrize("precision", CONTRADICTIONS, ids=str)
def test_http_and_library_say_the_same(client: TestClient, precision: dict[str, Any]) -> None:
    # A selective cell is refused for its level, whatever layers it names.
    named = (
        {"selective_layers": ["fc1"]}
        if "fp32" in precision.values() and "selective" in precision.values()
        else {}
    )
    with pytest.raises(ValidationError) as refused:
        MixedPrecisionConfig(**precision, **named)
    said = {(f"/precision/{error['loc'][0]}", error["msg"]) for error in refused.value.errors()}
    answer = client.post("/jobs", json={**SPEC, "precision": {**precision, **named}})
    assert answer.status_code == 422
    assert {(error["pointer"], error["detail"]) for error in answer.json()["errors"]} == said
    assert client.get("/jobs").json()["items"] == []


def test_every_refused_cell_is_among_them() -> None:
    cells = {(entry.get("mode"), entry.get("precision_level")) for entry in CONTRADICTIONS}
    assert {(mode.value, level.value) for mode, level in REFUSED_CELLS} <= cells
