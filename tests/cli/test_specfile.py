"""Reading job files: YAML and JSON give the same document, and nothing is changed or lost unsaid."""

import datetime as dt
import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from halfstep.service.cli.specfile import UnreadableSpec, read_spec

SPEC = {"model": {"name": "mlp", "params": {"hidden": [512]}}, "dataset": {"name": "digits"}, "priority": -3}


@pytest.mark.parametrize(("suffix", "dump"), [(".yaml", yaml.safe_dump), (".json", json.dumps)])
def test_yaml_and_json_give_the_same_document(tmp_path: Path, suffix, dump) -> None:
    path = tmp_path / f"job{suffix}"
    path.write_text(dump(SPEC), encoding="utf-8")
    assert read_spec(str(path)) == SPEC


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(SPEC).encode())))
    assert read_spec("-") == SPEC


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
def test_numbers_mean_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"lr: {text}\n")
    assert read_spec(str(path)) == {"lr": 0.001}


def test_text_that_looks_like_an_exponent_in_quotes_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: '1e-3'\ncommit: 12ab34\n")
    assert read_spec(str(path)) == {"name": "1e-3", "commit": "12ab34"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.yaml", "model: [", "line"),
        ("a.yaml", "- model", "must be a mapping"),
        ("a.yaml", "", "must be a mapping"),
        ("a.yaml", "name: a\nname: b\n", "'name' comes twice"),
        ("a.json", '{"name": "a", "name": "b"}', "'name' comes twice"),
        ("a.json", '{"name": ', "line 1"),
        (
            "a.yaml",
            "precision: {initial_scale: .inf}",
            "/precision/initial_scale: inf is not a finite number",
        ),
        ("a.json", '{"lr": NaN}', "/lr: nan is not a finite number"),
        ("a.yaml", "tags: {1: x}", "/tags: the key 1 is not text"),
        (
            "a.yaml",
            f"name: {dt.date(2024, 1, 2)}",
            "/name: a date is not a JSON value; put it in quotes",
        ),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.yaml", "a: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("a.yaml", "model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a.json", " " * 1_048_577, "larger than"),
    ],
)
def test_what_cannot_be_a_job_is_said_with_its_place(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UnreadableSpec, match=name) as error:
        read_spec(str(path))
    assert says in str(error.value)


def test_absent_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSpec, match="No such file"):
        read_spec(str(tmp_path / "absent.yaml"))
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnreadableSpec, match="not UTF-8"):
        read_spec(str(tmp_path / "x.yaml"))
