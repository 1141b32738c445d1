"""The accuracy table is what its results give, and the comparison can fail."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import METRIC, PRECISIONS, compare, table

FOLDER = Path(__file__).parents[2] / "benchmarks"


def runs(low: list[float], base: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "work": next(iter(METRIC)),
            "precision": precision,
            "seed": seed,
            "value": value,
            "held_out_loss": value,
            "skipped": 0,
        }
        for precision, values in (("FP32", base), ("BF16", low))
        for seed, value in enumerate(values)
    ]


def test_the_published_table_is_that_of_the_published_runs() -> None:
    results = json.loads((FOLDER / "results" / "accuracy.json").read_text(encoding="utf-8"))
    cells = compare(results["runs"])
    assert json.dumps(cells) == json.dumps(results["cells"])
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert table(cells) in readme
    assert results["machine"]["commit"].split()[0] in readme
    assert {(c["work"], c["precision"]) for c in cells} == {(w, p) for w in METRIC for p in PRECISIONS}
    assert all(cell["n"] == 5 for cell in cells)


def test_a_precision_that_is_worse_is_outside() -> None:
    base = [0.96, 0.97, 0.98, 0.97, 0.96]
    _, worse = compare(runs([value - 0.1 for value in base], base))
    _, alike = compare(runs([value + 0.001 for value in base], base))
    assert (worse["inside"], alike["inside"]) == (False, True)
    assert worse["difference"] == pytest.approx(-0.1)
    assert worse["paired_standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert "**outside**" in table([worse])


def test_a_precision_that_lowered_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"BF16: seeds \[1\] are FP32's to the bit"):
        compare(runs([0.5, 0.97, 0.6], [0.96, 0.97, 0.98]))
