"""The data directory's lock, and the embedded broker's socket in it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfstep.service.cli.up import broker
from halfstep.service.cli.up.instance import LOCK_FILE, held
from halfstep.service.errors import ConfigurationError


def test_it_is_made_private(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
        assert (tmp_path / "a" / "b" / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        held(tmp_path),
        pytest.raises(ConfigurationError, match=rf"process {os.getpid()}\).*HALFSTEP_DATA_DIR"),
    ):
        held(tmp_path).__enter__()
    with held(tmp_path):
        pass


def test_a_killed_holder_holds_no_more(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from halfstep.service.cli.up.instance import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigurationError, match=f"process {holder.pid}"):
        held(tmp_path).__enter__()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with held(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file/x cannot be used \(Not a directory\)"):
        held(tmp_path / "file" / "x").__enter__()


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_socket_path_has_the_systems_limit(length: int, fits: bool) -> None:
    path = Path("/" + "d" * (length - 1 - len("/b.sock")) + "/b.sock")
    assert len(str(path)) == length
    if fits:
        assert str(path) in broker.command(path)
    else:
        with pytest.raises(ConfigurationError, match=r"108 bytes.*HALFSTEP_DATA_DIR.*HALFSTEP_BROKER_URL"):
            broker.command(path)


def test_bytes_are_counted_not_characters() -> None:
    with pytest.raises(ConfigurationError, match="bytes"):
        broker.command(Path("/" + "é" * 60 + "/b.sock"))


def test_without_the_wheel_the_error_asks_for_a_broker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="HALFSTEP_BROKER_URL"):
        broker.server_binary()


def test_a_wheel_without_a_server_for_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(ConfigurationError, match=r"no server for this platform.*HALFSTEP_BROKER_URL"):
        broker.server_binary()


def test_the_server_answers_on_the_socket_alone_and_only_to_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "with a blank"
    folder.mkdir()
    path = folder / "b.sock"
    assert not asyncio.run(broker.answers(path))
    server = subprocess.Popen(broker.command(path), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not asyncio.run(broker.answers(path)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert path.stat().st_mode & 0o077 == 0
        listening = Path(f"/proc/{server.pid}/net/tcp").read_text().splitlines()[1:]
        sockets = {
            str(each.readlink()) for each in Path(f"/proc/{server.pid}/fd").iterdir() if each.is_symlink()
        }
        inodes = {line.split()[9] for line in listening}
        assert not inodes & {each.removeprefix("socket:[").removesuffix("]") for each in sockets}
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0
    assert [each.name for each in folder.iterdir() if each.name != "b.sock"] == []  # nothing kept on disk
