"""Writes down the SQL that a worker, a dispatcher and an API of 0.1 send while jobs go through their lives.

Run by the Python of 0.1 (`recording` does it), over a copy of the frozen installation:

    python statements.py DATABASE_URL INDEX_JSON OUTPUT_JSON

A test sends the same statements to the migrated database, as processes of 0.1 beside newer ones would.
"""

import base64
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Engine, event

making = importlib.import_module("making")
old = making.old


class _Story:
    def __init__(self, url: str, jobs: dict[str, str]) -> None:
        self.database, self.ids = old("service.store.database").Database(url), jobs
        self.jobs, self.metrics = old("service.store.jobs"), old("service.store.metrics")
        self.events, self.workers = old("service.store.events"), old("service.store.workers")
        self.states = old("service.contract.states").JobState
        self.transactions: list[list[list[Any]]] = []

    def note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA")):
            self.transactions[-1].append([statement, _plain(parameters)])

    def write(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.transactions.append([])
        with self.database.begin() as session:
            return function(session, *arguments, **named)

    def read(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.transactions.append([])
        with self.database.read() as session:
            return function(session, *arguments, **named)

    # A worker's.

    def start(self) -> None:
        components = old("service.store.components")
        self.write(
            self.workers.register,
            worker_id="worker-old",
            name="host-old",
            pid=11,
            capability=making.capability(),
            versions={"halfstep": "0.1.0"},
            slots=1,
            speed=None,
        )
        self.write(components.publish, self.read(components.list_components))
        self.write(self.workers.beat, "worker-old", busy=0, draining=False)

    def claim(self, name: str) -> tuple[str, int]:
        job_id = self.ids[name]
        able = making.capability()
        self.read(self.jobs.any_waiting, capability=able)
        claim = self.jobs.claim
        job = self.write(claim, worker_id="worker-old", capability=able, lease_seconds=1e9, hint=job_id)
        if job is None or job.id != job_id:
            raise SystemExit(f"claimed {job} instead of {name}")
        self.read(self.jobs.checkpoints, job_id)
        self.read(self.jobs.active_seconds, job_id)
        self.read(self.events.read, job_id, type="precision", limit=10_000)
        return job_id, int(job.fence)

    def opened(self, job_id: str, fence: int) -> None:
        def both(session: Any) -> None:
            self.jobs.mark_running(session, job_id, fence)
            self.metrics.opened(session, job_id, fence, total_steps=2100)

        self.write(both)

    def steps(self, job_id: str, fence: int, first: int, last: int) -> None:
        found = list(making.rows(first, last))
        self.write(self.metrics.append, job_id, fence, found, making.live(first, last))

    def heartbeat(self, job_id: str, fence: int) -> Any:
        self.read(self.jobs.requested, job_id, fence, worker_id="worker-old")
        return self.write(self.jobs.renew, job_id, fence, lease_seconds=1e9, worker_id="worker-old")

    def checkpoint(self, job_id: str, fence: int, step: int) -> None:
        self.write(
            self.jobs.record_checkpoint,
            job_id,
            fence,
            step=step,
            path=f"jobs/{job_id}/checkpoints/fence-{fence:06}-step-{step:010}",
            bytes=1000 + step,
            sha256=f"{step:064x}",
            manifest_sha256=f"{step + 1:064x}",
            metrics={"loss": 0.5, "held_out_loss": float("nan")},
        )

    def worker(self) -> None:
        """Three jobs: one to its end, one paused by a client, one drained."""
        self.start()
        job_id, fence = self.claim("given_back")
        self.opened(job_id, fence)
        self.write(self.metrics.truncate_after, job_id, fence, 0)
        for first, last in ((1, 300), (301, 600), (301, 600), (601, 1500), (1501, 2100)):
            self.steps(job_id, fence, first, last)
        self.heartbeat(job_id, fence)
        told = {"step": 7, "layers": ["fc1"], "value": float("inf")}
        append = self.events.append
        self.write(
            append, job_id, type="overflow", level="warning", message="overflow", data=told, fence=fence
        )
        evaluation = old("service.contract.metrics").Evaluation(
            step=2000, split="held_out", loss=0.25, metrics={"accuracy": 0.5}, seconds=0.125
        )
        self.write(self.metrics.evaluated, job_id, fence, evaluation)
        for step in (600, 1200, 2100):
            self.checkpoint(job_id, fence, step)
        self.write(self.jobs.drop_checkpoint, job_id, fence, 600)
        self.write(self.jobs.finish, job_id, fence, self.states.SUCCEEDED, None)

        job_id, fence = self.claim("queued")
        self.opened(job_id, fence)
        self.steps(job_id, fence, 1, 10)
        self.write(self.jobs.request_pause, job_id, tenant="acme")
        if self.heartbeat(job_id, fence) != "pause":
            raise SystemExit("the worker was not asked to pause")
        self.checkpoint(job_id, fence, 10)
        self.write(self.jobs.finish, job_id, fence, self.states.PAUSED, None)

        job_id, fence = self.claim("retry")
        self.opened(job_id, fence)
        self.write(self.metrics.truncate_after, job_id, fence, 60)
        self.steps(job_id, fence, 61, 70)
        self.write(self.metrics.truncate_after, job_id, fence, 65)
        self.write(
            self.jobs.release, job_id, fence, charge_attempt=False, why="the worker was drained", left=None
        )
        self.write(self.workers.beat, "worker-old", busy=0, draining=True)
        self.write(self.workers.remove, "worker-old")

    def dispatcher(self) -> None:
        """One round of its duties."""
        self.write(self.jobs.reap)
        waiting = self.read(self.jobs.unclaimed, older_than=0.0, limit=100)
        self.write(self.jobs.mark_published, waiting)
        self.write(self.jobs.fail_without_worker, seconds=0.0)
        self.read(self.jobs.expired, days=1e4, limit=10)
        for job_id, _ in self.read(self.jobs.unswept, limit=10):
            while not self.write(self.jobs.sweep, job_id):
                pass

    def api(self) -> None:
        """What clients ask of an API process that has not been replaced yet."""
        keys, retries = old("service.store.keys"), old("service.store.retries")
        self.read(keys.authenticate, making.SECRETS["acme"])
        spec = old("service.contract.spec").JobSpec.model_validate(making.TRAINED | {"tags": {"old": "api"}})
        submit = self.jobs.submit
        self.write(submit, tenant="acme", spec=spec, idempotency_key="of-old", body_hash="0" * 64)
        self.write(self.jobs.request_cancel, self.ids["running"], tenant="acme")
        self.write(self.jobs.request_resume, self.ids["paused"], tenant="acme")
        new_id = self.jobs.new_job_id()
        self.write(retries.retry, self.ids["cancelled"], tenant="acme", new_id=new_id)
        self.write(self.jobs.delete, self.ids["first_chunks"], tenant="acme")
        for name in ("both_chunks", "running"):
            job_id = self.ids[name]
            self.read(self.metrics.summarise, job_id, tenant="acme")
            self.read(self.metrics.read, job_id, after_step=600, limit=1000, fields=None)
            self.read(self.metrics.downsample, job_id, from_step=1, to_step=None, max_points=9, fields=None)
            self.read(self.events.read, job_id, after=0, limit=100)
            self.read(self.jobs.transitions, job_id)
        self.read(self.jobs.list_jobs, tenant="acme", limit=21)
        self.read(self.workers.list_workers, live_seconds=30.0)
        self.read(self.jobs.counts)


def _plain(value: Any) -> Any:
    if isinstance(value, psycopg.Binary):
        value = value.obj
    if isinstance(value, bytes | memoryview):
        return {"base64": base64.b64encode(bytes(value)).decode("ascii")}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def main(url: str, index: Path, output: Path) -> None:
    """Play the story, and write what was sent."""
    story = _Story(url, json.loads(index.read_text(encoding="utf-8"))["jobs"])
    event.listen(Engine, "before_cursor_execute", story.note)
    for part in (story.worker, story.dispatcher, story.api):
        part()
    story.database.dispose()
    output.write_text(json.dumps(story.transactions), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
