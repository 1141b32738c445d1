"""The supervisor, with small processes for parts: order, restarts, limits, and nothing left behind."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.cli.up import supervisor
from halfstep.service.cli.up.merged_log import MergedLog
from halfstep.service.cli.up.supervisor import Part, StartFailed, Supervisor
from tests.e2e.cluster import alive, wait_for

# Announces itself, then waits to be stopped; what it does then depends on its second argument.
CHILD = textwrap.dedent(
    """
    import os, signal, sys, time
    name, manner = sys.argv[1:3]
    def stop(*_):
        os.write(1, b"stopped\\n")  # not print: the signal may come in the middle of the one below
        sys.exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if manner == "deaf" else stop)
    print("pid", os.getpid(), flush=True)
    if manner == "failing":
        sys.exit("no such setting")
    time.sleep(60)
    """
)


def part(name: str, manner: str = "good", *, stop_seconds: float = 5.0, **more: Any) -> Part:
    command = (sys.executable, "-I", "-S", "-c", CHILD, name, manner)
    return Part(name=name, command=command, stop_seconds=stop_seconds, **more)


class Run:
    """A supervisor over `parts`, whose log is at hand."""

    def __init__(self, *parts: Part, stop_seconds: float = 20.0) -> None:
        self.stream = io.StringIO()
        self.supervisor = Supervisor(
            parts, environment=os.environ, log=MergedLog(self.stream), stop_seconds=stop_seconds
        )

    @property
    def lines(self) -> list[tuple[str, str]]:
        pairs = [line.split(maxsplit=1) for line in self.stream.getvalue().splitlines()]
        return [(pair[0], pair[1]) for pair in pairs]

    def pids(self, name: str) -> list[int]:
        return [int(text.split()[1]) for who, text in self.lines if who == name and text.startswith("pid ")]

    async def until(self, look: Callable[[], object]) -> None:
        deadline = time.monotonic() + 15
        while not look():
            assert time.monotonic() < deadline, self.lines
            await asyncio.sleep(0.01)

    def go(self, then: Callable[[], Awaitable[None]]) -> None:
        async def both() -> None:
            running = asyncio.create_task(self.supervisor.run())
            await then()
            self.supervisor.stop()
            await running

        asyncio.run(both())


def test_parts_stop_in_the_reverse_order_of_their_start() -> None:
    run = Run(part("broker"), part("api"), part("worker"))

    async def then() -> None:
        await run.until(lambda: all(run.pids(name) for name in ("broker", "api", "worker")))

    run.go(then)
    told = [line for line in run.lines if line[1].startswith("stop")]
    assert told == [
        ("up", "stopping worker"), ("worker", "stopped"),
        ("up", "stopping api"), ("api", "stopped"),
        ("up", "stopping broker"), ("broker", "stopped"),
    ]  # fmt: skip
    assert not any(alive(pid) for name in ("broker", "api", "worker") for pid in run.pids(name))


def test_later_parts_wait_for_one_that_must_be_ready_first() -> None:
    asked: list[int] = []
    ready_at: list[float] = []

    async def ready() -> bool:
        asked.append(1)
        if len(asked) < 5:
            return False
        ready_at.append(time.time())
        return True

    run = Run(part("broker", ready=ready), part("api"))

    async def then() -> None:
        await run.until(lambda: run.pids("api"))
        started = Path(f"/proc/{run.pids('api')[0]}").stat().st_ctime
        assert started >= ready_at[0] - 0.05

    run.go(then)
    assert len(asked) == 5


def test_a_part_that_never_gets_ready_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "READY_SECONDS", 0.3)

    async def never() -> bool:
        return False

    run = Run(part("broker", ready=never), part("api"))
    with pytest.raises(StartFailed, match="broker did not answer"):
        asyncio.run(run.supervisor.run())
    assert not run.pids("api")
    assert not any(alive(pid) for pid in run.pids("broker"))


def test_a_part_that_is_killed_starts_again_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.05)
    run = Run(part("api"), part("worker"))

    def started(lives: int) -> bool:
        return len(run.pids("worker")) == lives

    async def then() -> None:
        for life in (1, 2, 3):
            await run.until(partial(started, life))
            if life < 3:
                os.kill(run.pids("worker")[-1], signal.SIGKILL)

    run.go(then)
    told = [text for who, text in run.lines if who == "up" and "again" in text]
    assert told == [
        "worker ended (SIGKILL); starting it again in 0.05 s",
        "worker ended (SIGKILL); starting it again in 0.1 s",
    ]
    assert len(run.pids("api")) == 1


def test_an_error_exit_at_the_first_start_ends_everything() -> None:
    run = Run(part("api"), part("worker", "failing"))
    with pytest.raises(StartFailed, match=r"worker could not start \(exit code 1\)"):
        asyncio.run(run.supervisor.run())
    assert ("worker", "no such setting") in run.lines
    assert not any(alive(pid) for pid in run.pids("api"))


def test_a_part_that_ignores_the_request_is_killed_in_time() -> None:
    run = Run(
        part("api", "deaf", stop_seconds=60), part("worker", "deaf", stop_seconds=0.5), stop_seconds=1.0
    )

    async def then() -> None:
        await run.until(lambda: run.pids("api") and run.pids("worker"))

    began = time.monotonic()
    run.go(then)
    assert time.monotonic() - began < 10
    assert ("up", "worker did not stop within 0.5 s; killing it") in run.lines
    assert not any(alive(pid) for name in ("api", "worker") for pid in run.pids(name))


def test_a_second_request_kills_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "REPEAT_SECONDS", 0.5)
    run = Run(part("worker", "deaf", stop_seconds=60), stop_seconds=60)
    survived: list[bool] = []

    async def then() -> None:
        await run.until(lambda: run.pids("worker"))
        loop = asyncio.get_running_loop()
        loop.call_later(0.1, run.supervisor.stop)  # the same request, told twice
        loop.call_later(0.4, lambda: survived.append(alive(run.pids("worker")[0])))
        loop.call_later(0.8, run.supervisor.stop)

    began = time.monotonic()
    run.go(then)
    assert time.monotonic() - began < 10
    assert survived == [True]
    assert not alive(run.pids("worker")[0])


DRIVER = textwrap.dedent(
    """
    import asyncio, os, signal, sys
    from halfstep.service.cli.up.merged_log import MergedLog
    from halfstep.service.cli.up.supervisor import Part, Supervisor
    child = sys.argv[1]
    def part(name, manner, **more):
        command = (sys.executable, "-I", "-S", "-c", child, name, manner)
        return Part(name=name, command=command, stop_seconds=1.0, **more)
    parts = [part("api", "deaf"), part("worker", "good", orphan_signal=signal.SIGTERM)]
    asyncio.run(Supervisor(parts, environment=os.environ, log=MergedLog(), stop_seconds=10).run())
    """
)


class Driven:
    """A supervisor in a process of its own, to send signals to."""

    def __init__(self, folder: Path, *before: str) -> None:
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-c", DRIVER, CHILD], stdout=log, stderr=log, start_new_session=True
            )
        wait_for("both parts run", lambda: len(self.pids()) == 2, 20)

    def pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self.log.read_text().splitlines() if " pid " in line]


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_supervisor_takes_its_parts_with_it(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    driven.process.kill()
    driven.process.wait()
    wait_for("both parts are gone", lambda: not any(alive(pid) for pid in driven.pids()), 10)


HANGS_UP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_it_cleanly_and_reach_no_part(tmp_path: Path, number: signal.Signals) -> None:
    driven = Driven(tmp_path, sys.executable, "-c", HANGS_UP)  # these tests may run under nohup themselves
    os.killpg(driven.process.pid, number)  # as a terminal does: the whole foreground group
    assert driven.process.wait(timeout=20) == 0
    assert not any(alive(pid) for pid in driven.pids())
    told = [line for line in driven.log.read_text().splitlines() if " pid " not in line]
    assert told == [
        "up       stopping worker",
        "worker   stopped",
        "up       stopping api",
        "up       api did not stop within 1.0 s; killing it",
    ]


def test_an_interrupt_stops_one_that_a_script_put_in_the_background(tmp_path: Path) -> None:
    driven = Driven(tmp_path, "sh", "-c", "trap '' INT; exec \"$@\"", "sh")  # what `&` does in a script
    driven.process.send_signal(signal.SIGINT)
    assert driven.process.wait(timeout=20) == 0


def test_it_outlives_its_terminal_under_nohup(tmp_path: Path) -> None:
    driven = Driven(tmp_path, "nohup")
    driven.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert driven.process.poll() is None
    assert "stopping" not in driven.log.read_text()
    driven.process.send_signal(signal.SIGTERM)
    assert driven.process.wait(timeout=20) == 0


def test_the_leash_refuses_to_start_what_has_no_parent_any_more() -> None:
    command = [sys.executable, "-I", "-S", str(supervisor.LEASH), str(int(signal.SIGKILL))]
    ours = subprocess.run([*command, str(os.getpid()), "/bin/echo", "runs"], capture_output=True, check=False)
    assert (ours.returncode, ours.stdout) == (0, b"runs\n")
    other = subprocess.run([*command, "1", "/bin/echo", "runs"], capture_output=True, check=False)
    assert (other.returncode, other.stdout) == (1, b"")
