"""Reading job files: YAML and JSON give the same document, and nothing is changed or lost unsaid."""

import datetime as dt
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from halfstep.service.cli.specfile import UnreadableSpec, read_spec

SPEC = {"model": {"name": "mlp", "params": {"hidden": [512]}}, "dataset": {"name": "digits"}, "priority": -3}


@pytest.mark.parametrize(("suffix", "dump"), [(".yaml", yaml.safe_dump), (".json", json.dumps)])
def test_yaml_and_json_give_the_same_document(
    tmp_path: Path, suffix: str, dump: Callable[[object], str]
) -> None:
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
        ("a.yaml", "model: [", "at line 1 column"),
        ("a.yaml", "- model", "must be a mapping"),
        ("a.yaml", "", "must be a mapping"),
        ("a.yaml", "name: a\nname: b\n", 'duplicate key "name", at line 2 column 1'),
        ("a.yaml", "model:\n  name: a\n  name: b\n", 'duplicate key "name", at line 3 column 3'),
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
            f"name: !!timestamp {dt.date(2024, 1, 2)}",
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


PLAIN = ["on", "off", "yes", "no", "y", "1_000", "0b11", "12:30", "2024-01-02", "1e", "0x", "e5", "=", "<<"]


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_yaml_1_1_reads_as_something_else_is_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"value: {text}\n")
    assert read_spec(str(path)) == {"value": text}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("+12", 12),
        ("1e3", 1000.0),
        ("-2.5E-1", -0.25),
    ],
)
def test_the_core_schema_of_yaml_1_2(tmp_path: Path, text: str, meant: object) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"value: {text}\n")
    read = read_spec(str(path))["value"]
    assert (read, type(read)) == (meant, type(meant))


def test_anchors_and_block_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: &x {lr: 1e-3}\nb: *x\nc: |\n  one\n  two\n")
    assert read_spec(str(path)) == {"a": {"lr": 0.001}, "b": {"lr": 0.001}, "c": "one\ntwo\n"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_in_another_encoding_is_told_so(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.yaml").write_text("model: {name: mlp}", encoding=encoding)
    with pytest.raises(UnreadableSpec, match=f"but {encoding.upper()}: save it as UTF-8"):
        read_spec(str(tmp_path / "x.yaml"))


def test_absent_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSpec, match="No such file"):
        read_spec(str(tmp_path / "absent.yaml"))
    (tmp_path / "x.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UnreadableSpec, match="not UTF-8"):
        read_spec(str(tmp_path / "x.yaml"))
