"""The faults, by name: each does one thing to an installation, at a random moment of a random job.

A fault answers whom it hit; what came of it is the checker's to say.
"""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy.orm import Session

from service.queue import RUN_JOB, make_celery
from service.store import jobs
from tests.e2e.cluster import ROOT, children_of
from tests.faults.client import Client
from tests.faults.installation import LEASE_SECONDS, Installation
from tests.faults.variants import SAVE_EVERY

CLOCK = Path(__file__).parent / "clock"  # its sitecustomize shifts the clock


@dataclass(slots=True)
class Fault:
    """One injected fault. `job_id` and `fence` are of the job that it hit, if it hit one."""

    kind: str
    at: float
    hit: bool = False
    job_id: str | None = None
    fence: int | None = None


class Injector:
    """Draws and injects faults; everything random comes from the seed."""

    def __init__(self, installation: Installation, client: Client, draw: random.Random) -> None:
        self.installation, self.client, self.draw = installation, client, draw
        self.faults: list[Fault] = []
        self.to_resume: set[str] = set()  # asked to pause; whoever waits for the end resumes them

    def inject(self, kind: str) -> Fault:
        fault = Fault(kind, time.time())
        self.faults.append(fault)
        KINDS[kind](self, fault)
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

    def somebody_runs(self, fault: Fault) -> None:
        fault.hit = bool(self.installation.holders())

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
            self.installation.kill(worker, signal.SIGTERM)

    def freeze_worker(self, fault: Fault) -> None:
        """Its job's process trains on, and does not learn that the job belongs to another."""
        worker = self.victim(fault)
        if worker is not None:
            self._freeze([self.installation.pid(worker)])

    def freeze_worker_and_child(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            pid = self.installation.pid(worker)
            self._freeze([pid, *children_of(pid)])

    def _freeze(self, pids: list[int]) -> None:
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        time.sleep(LEASE_SECONDS * self.draw.uniform(2.0, 4.0))
        for pid in reversed(pids):  # the job's process wakes first, and writes before it can be told
            _signal(pid, signal.SIGCONT)

    def kill_api(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.kill("api")

    def kill_api_in_a_submission(self, fault: Fault) -> None:
        point = self.draw.choice(("submit.before_commit", "submit.after_commit", "submit.after_enqueue"))
        self.installation.arm(point, times=self.draw.randint(1, 2))
        self.somebody_runs(fault)

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

    def _proxied(self, fault: Fault, mode: str, *, redis: bool) -> None:
        self.somebody_runs(fault)
        proxy = self.installation.redis_proxy if redis else self.installation.postgres_proxy
        if proxy is None:
            return
        proxy.mode = mode
        if mode == "refuse":
            proxy.cut()
        time.sleep(self.draw.uniform(0.5, 4.0))
        proxy.mode = "pass"

    def strange_messages(self, fault: Fault) -> None:
        """Wake-ups for jobs that run, that ended and that never were, and what is no message at all."""
        self.somebody_runs(fault)
        broker = f"redis://127.0.0.1:{self.installation.redis.port}/0"
        known = [job.id for job in self.installation.look(_newest)]
        celery = make_celery(broker, publisher=True)
        for argument in (
            *known[:3] * 2,
            "no-such-job",
            None,
            7,
            {"a": [1]},
        ):
            celery.send_task(RUN_JOB, args=[argument], queue="halfstep", retry=False)
        celery.send_task(RUN_JOB, args=[], kwargs={"other": True}, queue="halfstep", retry=False)
        celery.send_task("another.task", args=[], queue="halfstep", retry=False)
        celery.close()

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
        self.installation.arm("checkpoint.after_write", "no-space", times=self.draw.randint(1, 3))
        self.somebody_runs(fault)

    def disk_error(self, fault: Fault) -> None:
        self.installation.arm(
            self.draw.choice(("checkpoint.after_fsync", "checkpoint.after_rename")), "io-error"
        )
        self.somebody_runs(fault)

    def damage_a_checkpoint(self, fault: Fault) -> None:
        """Of a job that trains, then its process is killed, so that it must be read again."""
        worker = self.victim(fault)
        if worker is None or fault.job_id is None:
            return
        deadline = time.monotonic() + 2.0
        kept: list[jobs.Checkpoint] = []
        while time.monotonic() < deadline and not (kept and kept[0].step >= 3 * SAVE_EVERY):
            kept = self.installation.look(partial(jobs.checkpoints, job_id=fault.job_id))
            time.sleep(0.05)
        # Damage is survived where there is an older one to go back to.
        if kept and kept[0].step >= 3 * SAVE_EVERY:
            folder = self.installation.data_dir / kept[0].path
            other = self.installation.data_dir / kept[-1].path
            _damage(folder, other, self.draw)
        self.kill_child_of(worker, fault)

    def kill_child_of(self, worker: str, fault: Fault) -> None:
        child = self.installation.child(worker)
        fault.hit = child is not None
        if child is not None:
            _signal(child, signal.SIGKILL)

    def power_loss(self, fault: Fault) -> None:
        """All that a job's process never fsynced is gone with it."""
        if self.victim(fault) is not None:
            (self.installation.points / "power-loss").touch()

    def hung_step(self, fault: Fault) -> None:
        self.installation.arm("child.step", "hang", skip=self.draw.randrange(40))
        self.somebody_runs(fault)

    def crash_point(self, fault: Fault) -> None:
        self.installation.arm(
            self.draw.choice(POINTS), times=self.draw.randint(1, 2), skip=self.draw.randrange(4)
        )
        self.somebody_runs(fault)

    def worker_on_another_clock(self, fault: Fault) -> None:
        """A worker starts again an hour early or late; leases go by the database's clock."""
        worker = self.victim(fault)
        if worker is not None:
            shift = self.draw.choice(("3600", "-3600"))
            path = f"{CLOCK}{os.pathsep}{ROOT}"
            self.installation.restart_under(worker, {"PYTHONPATH": path, "HALFSTEP_TEST_CLOCK_SHIFT": shift})

    def cancel(self, fault: Fault) -> None:
        job_id = self._open_job()
        if job_id is not None:
            fault.hit, fault.job_id = True, job_id
            self.client.ask("POST", f"/jobs/{job_id}/cancel", job_id=job_id)

    def pause_and_resume(self, fault: Fault) -> None:
        job_id = self._open_job()
        if job_id is None:
            return
        fault.job_id = job_id
        status, _ = self.client.ask("POST", f"/jobs/{job_id}/pause", job_id=job_id)
        fault.hit = status == 200
        self.to_resume.add(job_id)

    def resume_paused(self) -> None:
        for job_id in list(self.to_resume):
            state = self.installation.look(partial(jobs.get, job_id=job_id, tenant=None)).state
            if state.is_terminal:
                self.to_resume.discard(job_id)
            elif state == "paused":
                self.client.ask("POST", f"/jobs/{job_id}/resume", job_id=job_id)

    def _open_job(self) -> str | None:
        found = [job.id for job in self.installation.look(_newest) if not job.state.is_terminal]
        return self.draw.choice(found) if found else None


def _newest(s: Session) -> list[jobs.Job]:
    return jobs.list_jobs(s, tenant=None, limit=100)


def _damage(folder: Path, other: Path, draw: random.Random) -> None:
    """Truncate, flip one bit, or swap in another checkpoint's file; the job may remove it meanwhile."""
    name = draw.choice(("model.safetensors", "state.pt", "manifest.json"))
    try:
        data = bytearray((folder / name).read_bytes())
        match draw.randrange(3):
            case 0:
                del data[draw.randrange(len(data)) :]
            case 1:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case _:
                shutil.copy(other / name, folder / name)
                return
        (folder / name).write_bytes(data)
    except OSError:
        pass


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# Every point that product code reaches; `test_points` holds that the list is complete.
POINTS = (
    "submit.before_commit",
    "submit.after_commit",
    "submit.after_enqueue",
    "dispatch.after_send",
    "reap.before_commit",
    "claim.before_commit",
    "claim.after_commit",
    "order.before",
    "order.after",
    "child.ordered",
    "opened.before_commit",
    "resume.before_commit",
    "resume.after_commit",
    "child.step",
    "report.before_commit",
    "report.after_commit",
    "checkpoint.after_write",
    "checkpoint.after_fsync",
    "checkpoint.after_rename",
    "checkpoint.before_manifest",
    "checkpoint.after_manifest",
    "checkpoint.before_reference",
    "checkpoint.after_reference",
    "checkpoint.before_removal",
    "child.before_done",
    "conclude.before",
    "conclude.before_commit",
    "conclude.after_commit",
    "drain.asked",
)

KINDS: dict[str, Callable[[Injector, Fault], None]] = {
    name.replace("_", " "): getattr(Injector, name)
    for name in (
        "kill_worker",
        "kill_child",
        "term_then_kill_worker",
        "drain_worker",
        "freeze_worker",
        "freeze_worker_and_child",
        "kill_api",
        "kill_api_in_a_submission",
        "kill_dispatcher",
        "flush_redis",
        "restart_redis",
        "redis_away",
        "redis_silent",
        "redis_slow",
        "postgres_silent",
        "postgres_slow",
        "postgres_cut",
        "postgres_crash",
        "strange_messages",
        "garbage_on_the_queue",
        "disk_full",
        "disk_error",
        "damage_a_checkpoint",
        "power_loss",
        "hung_step",
        "crash_point",
        "worker_on_another_clock",
        "cancel",
        "pause_and_resume",
    )
}
# Those that end a job's process or take it from its worker: recovery is measured after these.
KILLS = {
    "kill worker",
    "kill child",
    "term then kill worker",
    "drain worker",
    "freeze worker",
    "freeze worker and child",
    "damage a checkpoint",
    "power loss",
    "worker on another clock",
}


def schedule(count: int, kind: str, draw: random.Random) -> list[str]:
    """`count` faults for this kind of database: half of them kills of what trains, the rest each in turn."""
    possible = [name for name in KINDS if kind == "postgresql" or not name.startswith("postgres")]
    kills = ["kill worker", "kill child", "freeze worker"]
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += [*draw.sample(possible, len(possible)), *kills * (len(possible) // 4)]
    drawn = drawn[:count]
    draw.shuffle(drawn)
    return drawn
