"""The comparison of two benchmark runs names what got worse, and only that."""

import json
from pathlib import Path

import pytest

from benchmarks.compare import judge, main
from benchmarks.support.report import Better, Figure, Report, read


def figure(*values: float, better: Better = "lower") -> Figure:
    return Figure("step", "ms", better, values)


STEADY = (1.0, 1.01, 0.99, 1.0, 1.02)
NOISY = (1.0, 1.6, 0.7, 1.2, 0.8)


@pytest.mark.parametrize(
    ("old", "new", "better", "worse"),
    [
        (STEADY, tuple(1.2 * v for v in STEADY), "lower", True),
        (STEADY, tuple(1.2 * v for v in STEADY), "higher", False),
        (STEADY, tuple(v / 1.2 for v in STEADY), "higher", True),
        (STEADY, tuple(1.2 * v for v in STEADY), "neither", False),
        (STEADY, tuple(1.03 * v for v in STEADY), "lower", False),  # within the tolerance
        (NOISY, tuple(1.2 * v for v in NOISY), "lower", False),  # within the noise
        (STEADY[:1], (1.12,), "lower", False),  # too few values for so small a change
        (STEADY[:1], (1.2,), "lower", True),
    ],
)
def test_worse_means_the_wrong_way_beyond_tolerance_and_noise(
    old: tuple[float, ...], new: tuple[float, ...], better: Better, worse: bool
) -> None:
    change = judge(figure(*old, better=better), figure(*new, better=better), tolerance=0.05)
    assert change.worse is worse
    assert not (change.worse and change.better)


def test_an_improvement_is_told_as_one() -> None:
    change = judge(figure(*STEADY), figure(*(v / 2 for v in STEADY)), tolerance=0.05)
    assert (change.worse, change.better, change.factor) == (False, True, 0.5)


def written(path: Path, values: tuple[float, ...]) -> Path:
    report = Report("step", {"rounds": len(values)})
    report.add("step", values, unit="ms", better="lower")
    report.write(path)
    return path


def test_what_is_written_is_read_back_with_machine_and_command(tmp_path: Path) -> None:
    path = written(tmp_path / "step.json", STEADY)
    assert read(path)["step"] == figure(*STEADY)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["machine"]["device"]
    assert document["command"].startswith("python -m benchmarks.step")


def test_the_command_names_what_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, factor in (("old", 1.0), ("new", 1.3)):
        (tmp_path / run).mkdir()
        written(tmp_path / run / "step.json", tuple(factor * v for v in STEADY))
    (tmp_path / "old" / "table.json").write_text("{}", encoding="utf-8")  # a result of another kind
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert main() == 1
    assert "WORSE  step: step: 1 -> 1.3 ms (1.30 x)" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "old"), str(tmp_path / "old")])
    assert main() == 0
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "old"), str(tmp_path / "empty")])
    assert main() == 2


@pytest.mark.parametrize("values", [(), (float("nan"),), (float("inf"), 1.0)])
def test_a_figure_without_finite_values_is_an_error(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="finite"):
        figure(*values)


def test_a_figure_is_measured_once(tmp_path: Path) -> None:
    report = Report("step", {})
    report.add("step", STEADY, unit="ms", better="lower")
    with pytest.raises(ValueError, match="twice"):
        report.add("step", STEADY, unit="ms", better="lower")


def test_parts_of_a_run_come_together_in_one_file(tmp_path: Path) -> None:
    path = written(tmp_path / "step.json", STEADY)
    for number in (2, 3):
        part = Report("step", {"part": number})
        part.add("step of one part", [float(number)], unit="ms", better="lower")
        part.write(path, add=True)
    assert read(path) == {
        "step": figure(*STEADY),
        "step of one part": Figure("step of one part", "ms", "lower", (3.0,)),
    }
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert [part["settings"] for part in parts] == [{"rounds": 5}, {"part": 2}, {"part": 3}]
    assert all(part["machine"]["device"] and part["command"] for part in parts)
    assert read(written(path, NOISY)) == {"step": figure(*NOISY)}  # without `add` the file is replaced
