"""`halfstep up`: one command, one log, one clean stop, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import ROOT, Cluster, alive, children_of, free_port, wait_for
from tests.e2e.test_installation import SMALL, long_job

pytestmark = pytest.mark.e2e


def family(pid: int) -> list[int]:
    return [pid] + [member for child in children_of(pid) for member in family(child)]


class Up:
    """`halfstep up` on the embedded default, in a data directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder, "", "")
        port = free_port()
        environment = {**self.cluster.environment, "HALFSTEP_PORT": str(port)}
        self.log = folder / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "halfstep.service.cli", "up"],
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.cluster.client.close()
        self.cluster.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        wait_for(f"it is ready: {self.log}", self._ready, 90)

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(self.cluster.get("/workers")["items"])
        except (httpx.TransportError, AssertionError):
            return False

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.cluster.client.close()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    started = Up(tmp_path)
    yield started
    started.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_job_runs_and_a_stop_leaves_nothing(up: Up, how: signal.Signals) -> None:
    ended = up.cluster.wait(up.cluster.submit(SMALL))
    assert ended["state"] == "succeeded"
    running = up.cluster.submit(long_job())
    wait_for("it trains", lambda: up.cluster.job(running)["stats"]["current_step"] > 50, 60)
    members = family(up.process.pid)
    assert len(members) >= 6  # supervisor, broker, API, dispatcher, worker, a job's process
    stopped = time.monotonic()
    up.process.send_signal(how)
    up.process.wait(timeout=35)
    assert time.monotonic() - stopped < 30
    wait_for("nothing is left", lambda: not any(alive(pid) for pid in members), 5)
    assert up.process.returncode == 0, up.log.read_text()


def test_a_killed_supervisor_leaves_no_orphan_and_the_job_goes_on_later(up: Up, tmp_path: Path) -> None:
    job_id = up.cluster.submit(long_job(1_500, checkpoint_every_steps=100))
    wait_for("it trains", lambda: up.cluster.job(job_id)["stats"]["current_step"] > 300, 60)
    members = family(up.process.pid)
    up.process.kill()
    up.process.wait()
    wait_for("nothing is left", lambda: not any(alive(pid) for pid in members), 20)
    again = Up(tmp_path)
    try:
        ended = again.cluster.wait(job_id)
        # The orphaned worker is told to stop, so it drains: no attempt is charged.
        assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
        assert again.cluster.columns(job_id, "step")["step"] == list(range(1, 1_501))
    finally:
        again.close()


def test_a_second_one_on_the_same_data_is_refused(up: Up) -> None:
    environment = {**up.cluster.environment, "HALFSTEP_PORT": str(free_port())}
    second = subprocess.run(
        [sys.executable, "-m", "halfstep.service.cli", "up"],
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert second.returncode != 0
    assert b"HALFSTEP_DATA_DIR" in second.stderr + second.stdout
