"""What `halfstep up` refuses before it starts anything, and which commands there are."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from halfstep.service.cli.app import OWNERS, command_tree
from halfstep.service.cli.up.instance import held
from tests.cli.conftest import Run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HALFSTEP_PORT", "0")
    # Whatever a test does to the settings by options must not outlive it.
    monkeypatch.setenv("HALFSTEP_HOST", "127.0.0.1")
    monkeypatch.setattr("halfstep.service.cli.parts._supervise", lambda *_: pytest.fail("it was started"))
    return tmp_path


def test_a_port_in_use_is_named(place: Path, halfstep: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = halfstep("up", "--port", str(port))
    assert ran.code == 1
    assert f"port {port} of 127.0.0.1 is in use; set HALFSTEP_PORT" in ran.err


def test_an_address_of_another_machine_is_named(place: Path, halfstep: Run) -> None:
    ran = halfstep("up", "--host", "192.0.2.1")
    assert ran.code == 1
    assert "cannot listen on 192.0.2.1" in ran.err


def test_a_second_one_on_the_same_data_is_refused(place: Path, halfstep: Run) -> None:
    with held(place / "data"):
        ran = halfstep("up")
    assert ran.code == 1
    assert "another `halfstep up`" in ran.err


def test_a_data_directory_whose_path_is_too_long(place: Path, halfstep: Run) -> None:
    ran = halfstep("up", "--data-dir", str(place / ("d" * 120)))
    assert ran.code == 1
    assert "HALFSTEP_DATA_DIR to a shorter path" in ran.err


def test_without_torch_the_remedy_is_named(
    place: Path, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.service.cli.parts.importlib.util.find_spec", lambda name: None)
    ran = halfstep("up")
    assert ran.code == 1
    assert "halfstep[all]" in ran.err


def names_in(tree: typer.Typer) -> set[str | None]:
    """The commands and the groups of commands of a tree."""
    own = {each.name or getattr(each.callback, "__name__", None) for each in tree.registered_commands}
    return own | {each.name for each in tree.registered_groups}


def test_each_command_is_found_by_its_owner_alone() -> None:
    assert names_in(command_tree()) == {name for names in OWNERS.values() for name in names}
    for names in OWNERS.values():
        for name in names:
            assert name in names_in(command_tree(name))


def test_client_commands_start_without_the_database_libraries() -> None:
    heavy = ("sqlalchemy", "alembic", "fastapi", "celery", "torch")
    code = "import sys; from halfstep.service.cli.app import command_tree; command_tree('stats')\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_openapi_prints_the_document(place: Path, halfstep: Run) -> None:
    document = json.loads(halfstep("openapi").out)
    assert document["info"]["title"]
    assert "/jobs/{job_id}/stats" in document["paths"]


def test_health_of_parts_that_are_not_there(
    place: Path, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFSTEP_PORT", "1")
    assert halfstep("health", "api").code == 1
    halfstep("migrate")
    ran = halfstep("health", "worker")
    assert ran.code == 1
    assert "has not been seen" in ran.err
    assert halfstep("health", "dispatch").code == 0
