"""A job's process from the parent's side: its messages, its last words, its end, and its parent's."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from halfstep.worker.host.process import ChildProcess, Exited
from halfstep.worker.protocol import Done, Progress, StopOrder
from tests.e2e.cluster import SOURCES, alive, wait_for

SOON = 20.0
PARENT = """
import time
from halfstep.worker.host.process import Spawner
child = Spawner().spawn({})
if %(ready)s:
    child.ready.result(120)
print(child.pid, flush=True)
time.sleep(600)
"""


def start(program: str) -> ChildProcess:
    """A process that runs `program` with `report` as its report pipe."""
    read_end, write_end = os.pipe()
    prelude = f"import os, sys, time, json\nreport = os.fdopen({write_end}, 'wb', buffering=0)\n"
    popen = subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[write_end],
        start_new_session=True,
    )
    os.close(write_end)
    return ChildProcess(popen, os.fdopen(read_end, "rb"))


def test_messages_arrive_in_order_and_the_exit_last() -> None:
    child = start("""
        print("a model may print anything, even {")
        report.write(b'{"kind": "Progress", "step": 1, "step_seconds": 0.5}\\n')
        report.write(b'not a message\\n')
        report.write(b'{"kind": "Done", "outcome": "finished", "step": 2}\\n')
        sys.exit(3)
    """)
    seen = [child.inbox.get(timeout=SOON) for _ in range(3)]
    assert seen == [Progress(step=1, step_seconds=0.5), Done(outcome="finished", step=2), Exited(3)]
    assert child.last_words == "a model may print anything, even {"
    assert not child.alive


def test_an_order_arrives_and_a_dead_process_takes_none() -> None:
    child = start("""
        line = sys.stdin.readline()
        print(json.loads(line)["why"])
    """)
    assert child.order(StopOrder(why="drain"))
    assert child.inbox.get(timeout=SOON) == Exited(0)
    assert child.last_words == "drain"
    assert not child.order(StopOrder(why="drain"))


def test_a_signal_reaches_the_whole_group(tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    child = start(f"""
        import subprocess
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(note)!r}, "w").write(str(grandchild.pid))
        report.write(b'{{"kind": "Progress", "step": 1, "step_seconds": 0.5}}\\n')
        time.sleep(600)
    """)
    assert child.inbox.get(timeout=SOON) == Progress(step=1, step_seconds=0.5)
    child.signal_group(signal.SIGKILL)
    assert child.inbox.get(timeout=SOON) == Exited(-9)
    wait_for("the grandchild is gone", lambda: not alive(int(note.read_text())), 5)


def test_a_straggler_does_not_outlive_its_job(tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    child = start(f"""
        import subprocess
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(note)!r}, "w").write(str(grandchild.pid))
    """)
    assert child.inbox.get(timeout=SOON) == Exited(0)
    wait_for("the grandchild is gone", lambda: not alive(int(note.read_text())), 5)


def test_a_process_that_cannot_start_says_why() -> None:
    child = start("raise SystemExit('no module named torch')")
    with pytest.raises(RuntimeError, match="no module named torch"):
        child.ready.result(timeout=SOON)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize(
    ("ready", "hung"),
    [(False, False), (True, False), (True, True)],
    ids=["while torch is imported", "ready", "hung"],
)
def test_a_process_dies_with_a_killed_parent(tmp_path: Path, ready: bool, hung: bool) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PARENT % {"ready": ready},
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCES, "HALFSTEP_DATA_DIR": str(tmp_path)},
        cwd=tmp_path,
    )
    assert parent.stdout is not None
    try:
        with parent.stdout:
            pid = int(parent.stdout.readline())
        assert alive(pid)
        if hung:  # it cannot notice the end of its orders: the kernel must end it
            os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    wait_for("the waiting process is gone", lambda: not alive(pid), 5)
