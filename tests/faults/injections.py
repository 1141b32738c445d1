"""The faults, by name: each does one thing to an installation, at a random moment of a random job.

A fault answers whom it hit; what came of it is the checker's to say.
"""

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from celery import Celery
from sqlalchemy.orm import Session

from service.contract.states import JobState
from service.queue import RUN_JOB, make_celery
from service.store import jobs
from tests.e2e.cluster import ROOT, children_of
from tests.faults.checker import Change
from tests.faults.client import Client
from tests.faults.installation import LEASE_SECONDS, Installation
from tests.faults.kinds import DRAIN, KILLS, POINTS
from tests.faults.variants import SAVE_EVERY

MOST_FROZEN_SECONDS = 10.0 * LEASE_SECONDS  # where every other worker is busy with a long job
ZOMBIE_SECONDS = 0.3  # a job's process that woke before its worker, which ends it, has to write

CLOCK = Path(__file__).parent / "clock"  # its sitecustomize shifts the clock

POWER_LOSS = "power-loss"  # a point of the suite's own, which `powerloss` reaches
Damage = Callable[[Path, Path, random.Random], None]  # a file, the same of an older checkpoint, the choice


@dataclass(slots=True)
class Fault:
    """One injected fault. `job_id` and `fence` are of the job that it hit, if it hit one.

    `point` is the fault point that it armed: it has hit once a process came by. `drained` is how many seconds
    a worker took to be gone after SIGTERM.
    """

    kind: str
    at: float
    hit: bool = False
    job_id: str | None = None
    fence: int | None = None
    point: str | None = None
    drained: float | None = None
    took: float = 0.0  # seconds until the injector was free again


class Injector:
    """Draws and injects faults; everything random comes from the seed."""

    def __init__(self, installation: Installation, client: Client, draw: random.Random) -> None:
        self.installation, self.client, self.draw = installation, client, draw
        self.faults: list[Fault] = []
        self.crowded = threading.Event()  # asks for more jobs than there are workers
        self.to_resume: set[str] = set()  # asked to pause; whoever waits for the end resumes them

    def inject(self, kind: str) -> Fault:
        fault = Fault(kind, time.time())
        self.faults.append(fault)
        began = time.monotonic()
        getattr(self, kind.replace(" ", "_"))(fault)
        fault.took = time.monotonic() - began
        return fault

    def victim(self, fault: Fault) -> str | None:
        """A worker that trains now; waited for a little, since workers are between jobs at times."""
        deadline = time.monotonic() + 8.0
        while time.monotonic() < deadline:
            held = {
                worker: job
                for worker, job in self.installation.holders().items()
                if job[1] == "running" and worker in self.installation.workers
            }
            if held:
                worker = self.draw.choice(sorted(held))
                fault.job_id, _, fault.fence = held[worker]
                fault.hit, fault.at = True, time.time()
                return worker
            time.sleep(0.05)
        return None

    def judge(self, changes: Sequence[Change]) -> None:
        """Say what hit, now that all is over.

        A fault that armed a point did where a process came by; a kill or a drain where the job went back to
        the queue for it, since a job may end in the very moment that its process is chosen.
        """
        for met in self.installation.hits():
            armed = [f for f in self.faults if f.point == met["point"] and f.at <= met["at"]]
            if armed:
                armed[-1].hit = True
        given_back: dict[tuple[str, int], float] = {
            (change.job_id, change.old_fence): change.at
            for change in changes
            if change.kind == "state" and change.new == JobState.QUEUED
        }
        for fault in self.faults:
            if fault.kind in {*KILLS, DRAIN} and fault.job_id is not None and fault.fence is not None:
                at = given_back.get((fault.job_id, fault.fence), 0.0)
                fault.hit = fault.hit and at >= fault.at

    def somebody_runs(self, fault: Fault) -> None:
        deadline = time.monotonic() + 5.0
        while not (running := bool(self.installation.holders())) and time.monotonic() < deadline:
            time.sleep(0.05)
        fault.hit = running

    def kill_worker(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            self.installation.kill(worker)

    def kill_child(self, fault: Fault) -> None:
        worker = self.victim(fault)
        child = None if worker is None else self.installation.child(worker)
        fault.hit = child is not None
        if child is not None:
            os.kill(child, signal.SIGKILL)

    def term_then_kill_worker(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            process = self.installation.cluster.processes[worker]
            process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            process.kill()

    def drain_worker(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            process = self.installation.cluster.processes[worker]
            self.installation.kill(worker, signal.SIGTERM)

            def wait() -> None:
                process.wait()
                fault.drained = time.time() - fault.at

            threading.Thread(target=wait, name="drained", daemon=True).start()

    def freeze_worker(self, fault: Fault) -> None:
        """Its job's process trains on, and does not learn that the job belongs to another."""
        worker = self.victim(fault)
        if worker is not None:
            self._freeze(self.installation.pid(worker), [], fault)

    def freeze_worker_and_child(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            pid = self.installation.pid(worker)
            self._freeze(pid, children_of(pid), fault)

    def _freeze(self, worker: int, children: list[int], fault: Fault) -> None:
        """Until another holds the job, and in half of all cases longer.

        The moment after a claim tells most: the new attempt has not yet cut the record back, so that nothing
        but the fence refuses what the old one adds. That moment is made long enough.
        """
        longer = self.draw.choice((0.0, self.draw.uniform(0.0, 2.0 * LEASE_SECONDS)))
        for pid in (worker, *children):
            _signal(pid, signal.SIGSTOP)
        deadline = time.monotonic() + MOST_FROZEN_SECONDS
        while not self._moved_on(fault) and time.monotonic() < deadline:
            time.sleep(0.01)
        newer = [] if longer else self._processes_of(fault.job_id)
        for pid in newer:
            _signal(pid, signal.SIGSTOP)
        time.sleep(longer)
        for pid in children:
            _signal(pid, signal.SIGCONT)
        if children:
            time.sleep(ZOMBIE_SECONDS)
        for pid in (*newer, worker):
            _signal(pid, signal.SIGCONT)

    def _processes_of(self, job_id: str | None) -> list[int]:
        """The worker that holds the job now, and its children."""
        for worker, (held, _, _) in self.installation.holders().items():
            if held == job_id:
                pid = self.installation.pid(worker)
                return [pid, *children_of(pid)]
        return []

    def _moved_on(self, fault: Fault) -> bool:
        """Another attempt has claimed the job, or none will."""
        if fault.job_id is None or fault.fence is None:
            return True
        job = self.installation.look(partial(jobs.get, job_id=fault.job_id, tenant=None))
        return job.fence > fault.fence or job.state.is_terminal or job.state is JobState.PAUSED

    def kill_api(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.kill("api")

    def kill_api_before_a_commit(self, fault: Fault) -> None:
        self._arm(fault, "submit.before_commit", times=self.draw.randint(1, 2))

    def kill_api_after_a_commit(self, fault: Fault) -> None:
        self._arm(fault, "submit.after_commit", times=self.draw.randint(1, 2))

    def kill_api_after_a_wake_up(self, fault: Fault) -> None:
        self._arm(fault, "submit.after_enqueue", times=self.draw.randint(1, 2))

    def kill_dispatcher(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.kill("dispatch")

    def flush_redis(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.redis.client.flushall()

    def restart_redis(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.redis.kill()
        time.sleep(self.draw.uniform(0.0, 2.0))
        self.installation.redis.start()

    def redis_away(self, fault: Fault) -> None:
        self._proxied(fault, "refuse", redis=True)

    def redis_away_for_a_minute(self, fault: Fault) -> None:
        self._proxied(fault, "refuse", redis=True, seconds=60.0)

    def redis_silent(self, fault: Fault) -> None:
        self._proxied(fault, "silent", redis=True)

    def redis_slow(self, fault: Fault) -> None:
        self._proxied(fault, "slow", redis=True)

    def postgres_silent(self, fault: Fault) -> None:
        self._proxied(fault, "silent", redis=False)

    def postgres_slow(self, fault: Fault) -> None:
        self._proxied(fault, "slow", redis=False)

    def postgres_cut(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        if self.installation.postgres_proxy is not None:
            self.installation.postgres_proxy.cut()

    def postgres_crash(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        if self.installation.postgres is not None:
            self.installation.postgres.stop("immediate")
            time.sleep(self.draw.uniform(0.0, 1.5))
            self.installation.postgres.start()

    def _proxied(self, fault: Fault, mode: str, *, redis: bool, seconds: float | None = None) -> None:
        self.somebody_runs(fault)
        proxy = self.installation.redis_proxy if redis else self.installation.postgres_proxy
        if proxy is None:
            return
        proxy.mode = mode
        if mode == "refuse":
            proxy.cut()
        time.sleep(self.draw.uniform(0.5, 4.0) if seconds is None else seconds)
        proxy.mode = "pass"

    def duplicate_messages(self, fault: Fault) -> None:
        """Wake-ups for jobs that wait, run or pause, each more than once."""
        self.somebody_runs(fault)
        self._send([job.id for job in self.installation.look(_newest) if not job.state.is_terminal] * 2)

    def stale_messages(self, fault: Fault) -> None:
        """Wake-ups for jobs that have ended, and for one that never was."""
        self.somebody_runs(fault)
        ended = [job.id for job in self.installation.look(_newest) if job.state.is_terminal]
        self._send([*ended[:5], "00000000-0000-0000-0000-000000000000"])

    def strange_messages(self, fault: Fault) -> None:
        """Tasks whose arguments are no job's id, and one of another name."""
        self.somebody_runs(fault)
        self._send(["no-such-job", None, 7, {"a": [1]}])
        with self._celery() as celery:
            celery.send_task(RUN_JOB, args=[], kwargs={"other": True}, queue="halfstep", retry=False)
            celery.send_task("another.task", args=[], queue="halfstep", retry=False)

    def _send(self, arguments: Sequence[object]) -> None:
        with self._celery() as celery:
            for argument in arguments:
                celery.send_task(RUN_JOB, args=[argument], queue="halfstep", retry=False)

    def _celery(self) -> Celery:
        return make_celery(f"redis://127.0.0.1:{self.installation.redis.port}/0", publisher=True)

    def garbage_on_the_queue(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        for garbage in (
            b"\xff\x00garbage",
            b"{}",
            b'{"body": "!", "headers": {}, "properties": {}}',
            b"[1, 2]",
        ):
            self.installation.redis.client.lpush("halfstep", garbage)

    def disk_full(self, fault: Fault) -> None:
        self._arm(fault, "checkpoint.after_write", "no-space", times=self.draw.randint(1, 3))

    def disk_error(self, fault: Fault) -> None:
        point = self.draw.choice(("checkpoint.after_fsync", "checkpoint.after_rename"))
        self._arm(fault, point, "io-error")

    def truncate_a_checkpoint(self, fault: Fault) -> None:
        self._damage(fault, _truncate)

    def flip_a_bit_of_a_checkpoint(self, fault: Fault) -> None:
        self._damage(fault, _flip)

    def swap_a_checkpoint(self, fault: Fault) -> None:
        self._damage(fault, _swap)

    def _damage(self, fault: Fault, damage: Damage) -> None:
        """Of a job that trains, the newest; then its process is killed, so that it must be read again."""
        deadline = time.monotonic() + 20.0
        while not self._damage_once(fault, damage) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _damage_once(self, fault: Fault, damage: Damage) -> bool:
        worker = self.victim(fault)
        fault.hit = False
        child = None if worker is None else self.installation.child(worker)
        if worker is None or child is None or fault.job_id is None:
            return False
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not self._going_back_is_possible(fault.job_id):
            time.sleep(0.02)
        # It must not save another one meanwhile: the newest is what it goes on from.
        _signal(child, signal.SIGSTOP)
        held = self.installation.holders().get(worker, ("", "", 0))
        if held == (fault.job_id, "running", fault.fence) and self._going_back_is_possible(fault.job_id):
            kept = self._kept(fault.job_id)
            newest, oldest = (self.installation.data_dir / each.path for each in (kept[0], kept[-1]))
            name = self.draw.choice(("model.safetensors", "state.pt", "manifest.json"))
            damage(newest / name, oldest / name, self.draw)
            fault.hit, fault.at = True, time.time()
            _signal(child, signal.SIGKILL)
        else:
            _signal(child, signal.SIGCONT)
        return fault.hit

    def _going_back_is_possible(self, job_id: str) -> bool:
        """Damage is survived where there is an older checkpoint."""
        kept = self._kept(job_id)
        return bool(kept) and kept[0].step >= 3 * SAVE_EVERY

    def _kept(self, job_id: str) -> list[jobs.Checkpoint]:
        return self.installation.look(partial(jobs.checkpoints, job_id=job_id))

    def power_loss(self, fault: Fault) -> None:
        """All that a job's process never fsynced is gone with it."""
        self._arm(fault, POWER_LOSS)

    def hung_step(self, fault: Fault) -> None:
        self._arm(fault, "child.step", "hang", skip=self.draw.randrange(40))

    def crash_point(self, fault: Fault) -> None:
        # One that is armed already, the step that is to hang above all, stays as it is.
        point = self.draw.choice([each for each in POINTS if each not in self.installation.armed()])
        self._arm(fault, point, times=self.draw.randint(1, 2), skip=self.draw.randrange(4))

    def _arm(self, fault: Fault, point: str, action: str = "kill", *, skip: int = 0, times: int = 1) -> None:
        fault.point = point
        self.installation.arm(point, action, skip=skip, times=times)

    def clock_an_hour_ahead(self, fault: Fault) -> None:
        self._restart_at(fault, 3600)

    def clock_an_hour_behind(self, fault: Fault) -> None:
        self._restart_at(fault, -3600)

    def _restart_at(self, fault: Fault, shift: int) -> None:
        """A worker starts again on a host whose clock is wrong; leases go by the database's."""
        worker = self.victim(fault)
        if worker is not None:
            path = f"{CLOCK}{os.pathsep}{ROOT}"
            environment = {"PYTHONPATH": path, "HALFSTEP_TEST_CLOCK_SHIFT": str(shift)}
            self.installation.restart_under(worker, environment)

    def cancel_what_is_queued(self, fault: Fault) -> None:
        self.crowded.set()
        self._cancel(fault, self._find(JobState.QUEUED))
        self.crowded.clear()

    def cancel_what_starts(self, fault: Fault) -> None:
        self._cancel(fault, self._find(JobState.STARTING))

    def cancel_what_runs(self, fault: Fault) -> None:
        self._cancel(fault, self._find(JobState.RUNNING))

    def cancel_twice(self, fault: Fault) -> None:
        job_id = self._find(JobState.RUNNING)
        self._cancel(fault, job_id)
        self._cancel(fault, job_id)

    def cancel_what_pauses(self, fault: Fault) -> None:
        job_id = self._pause()
        self._cancel(fault, job_id if self._state(job_id) is JobState.PAUSING else None)

    def cancel_what_is_paused(self, fault: Fault) -> None:
        job_id = self._pause()
        deadline = time.monotonic() + 5.0
        while self._state(job_id) is JobState.PAUSING and time.monotonic() < deadline:
            time.sleep(0.02)
        self._cancel(fault, job_id if self._state(job_id) is JobState.PAUSED else None)

    def pause_and_resume(self, fault: Fault) -> None:
        fault.job_id = self._pause()
        fault.hit = fault.job_id is not None

    def _pause(self) -> str | None:
        """Ask a job that runs to pause; whoever waits for the end resumes it where it is still paused."""
        job_id = self._find(JobState.RUNNING)
        if job_id is None:
            return None
        self.to_resume.add(job_id)
        return job_id if self._insist(f"/jobs/{job_id}/pause", job_id) else None

    def _cancel(self, fault: Fault, job_id: str | None) -> None:
        if job_id is not None:
            fault.job_id = job_id
            fault.hit = self._insist(f"/jobs/{job_id}/cancel", job_id)

    def _insist(self, path: str, job_id: str) -> bool:
        """Ask until there is an answer; whether it was yes."""
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            status, _ = self.client.ask("POST", path, job_id=job_id)
            if status not in {None, 503}:
                return status == 200
            time.sleep(0.1)
        return False

    def _find(self, state: JobState) -> str | None:
        """A job in this state; waited for a little."""
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            found = [job.id for job in self.installation.look(_newest) if job.state is state]
            if found:
                return self.draw.choice(found)
            time.sleep(0.01)
        return None

    def _state(self, job_id: str | None) -> JobState | None:
        if job_id is None:
            return None
        return self.installation.look(partial(jobs.get, job_id=job_id, tenant=None)).state

    def resume_paused(self) -> None:
        for job_id in list(self.to_resume):
            state = self.installation.look(partial(jobs.get, job_id=job_id, tenant=None)).state
            if state.is_terminal:
                self.to_resume.discard(job_id)
            elif state == "paused":
                self.client.ask("POST", f"/jobs/{job_id}/resume", job_id=job_id)


def _newest(s: Session) -> list[jobs.Job]:
    return jobs.list_jobs(s, tenant=None, limit=100)


def _truncate(file: Path, _: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _flip(file: Path, _: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _swap(file: Path, older: Path, _: random.Random) -> None:
    shutil.copy(older, file)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
