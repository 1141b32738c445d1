"""Two versions measured by turns: ratios are taken within a round, and what one side lacks is left out."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.report import Figure, read
from benchmarks.versions import measured, ratios, table


def of(**figures: float) -> dict[str, Figure]:
    return {name: Figure(name, "s", "lower", (value,)) for name, value in figures.items()}


def test_a_ratio_is_taken_within_its_round() -> None:
    slow_host = {"old": of(a=10.0), "new": of(a=11.0)}
    fast_host = {"old": of(a=1.0), "new": of(a=1.1)}
    assert ratios([slow_host, fast_host])["a"] == pytest.approx([1.1, 1.1])


def test_a_figure_that_one_side_lacks_is_left_out() -> None:
    assert set(ratios([{"old": of(a=1.0, b=1.0), "new": of(a=1.0, c=1.0)}])) == {"a"}


def test_the_table_tells_both_medians_and_the_range() -> None:
    rounds = [{"old": of(a=2.0), "new": of(a=3.0)}, {"old": of(a=2.0), "new": of(a=5.0)}]
    assert "| a | s | 2 | 4 | 2.000 | 1.500 to 2.500 | lower |" in table(rounds)


CHECKOUT = """
import json, sys
from pathlib import Path
figure = {"name": "a", "unit": "s", "better": "lower", "values": [VALUE]}
out = sys.argv[sys.argv.index("--out") + 1]
Path(out).write_text(json.dumps({"format": 1, "figures": [figure]}))
"""


def checkout(place: Path, value: str) -> Path:
    (place / "benchmarks").mkdir(parents=True)
    (place / "benchmarks" / "thing.py").write_text(CHECKOUT.replace("VALUE", value))
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return place


def test_each_side_is_run_in_its_own_checkout(tmp_path: Path) -> None:
    old, new = checkout(tmp_path / "old", "1.0"), checkout(tmp_path / "new", "3.0")
    out = tmp_path / "ratios.json"
    command = [sys.executable, "-m", "benchmarks.versions", str(old), str(new), "--benchmark", "thing"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--out", str(out)], capture_output=True, text=True, check=True
    )
    assert "| a | s | 1 | 3 | 3.000 |" in done.stdout
    assert read(out)["thing/a"].values == (3.0, 3.0)


def test_a_benchmark_that_fails_is_no_figure(tmp_path: Path) -> None:
    place = checkout(tmp_path / "old", "1.0")
    (place / "benchmarks" / "thing.py").write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        measured(place, "thing", [], tmp_path / "out.json")
