"""`docs/architecture.md` is true: what it names exists and is defined there, and no room is too full."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
MOST_FILES = 10


def _section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def _answers() -> list[tuple[str, str, str]]:
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", _section("Where is …?"), re.MULTILINE)
    return [(question, path, name) for question, path, name in rows]


def _defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def _rooms() -> list[Path]:
    inits = [each for top in ("service", "worker") for each in (ROOT / top).rglob("__init__.py")]
    return sorted(each.parent for each in inits)


@pytest.mark.parametrize(("question", "path", "name"), _answers(), ids=lambda each: str(each)[:60])
def test_where_something_is_is_where_the_page_says(question: str, path: str, name: str) -> None:
    assert (ROOT / path).is_file(), f"where is {question}? {path} does not exist"
    assert name in _defined_in(ROOT / path), f"where is {question}? {path} does not define {name}"


def test_the_page_answers_at_least_thirty_questions() -> None:
    answers = _answers()
    lines = [line for line in _section("Where is …?").splitlines() if line.startswith("| ")][1:]
    assert len(answers) == len(lines), "a line of the table does not name a file and a definition"
    assert len({question for question, _, _ in answers}) >= 30


@pytest.mark.parametrize("title", ["The rooms", "Four trips", "Where does something new go?"])
def test_every_path_that_the_page_names_exists(title: str) -> None:
    named = set(re.findall(r"`((?:service|worker|migrations|docker|tests|src)/[\w./-]+)`", _section(title)))
    assert named
    assert [each for each in sorted(named) if not (ROOT / each).exists()] == []


@pytest.mark.parametrize("room", _rooms(), ids=lambda each: str(each.relative_to(ROOT)))
def test_a_room_has_one_docstring_and_at_most_ten_files(room: Path) -> None:
    entries = [each for each in room.glob("*.py") if each.name not in ("__init__.py", "__main__.py")]
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert said, f"{room} does not say what it is for"
    assert len(entries) <= MOST_FILES, f"{room} has {len(entries)} files: which are a room of their own?"


def test_the_glossary_has_at_least_fifteen_words_in_order() -> None:
    words = re.findall(r"^\| ([\w -]+) \|", _section("Glossary"), re.MULTILINE)[1:]
    assert len(words) >= 15
    assert words == sorted(words)
