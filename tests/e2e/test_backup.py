"""A copy taken while jobs train, by the commands of docs/reliability.md, is restored, and the jobs go on."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from halfstep.service.store import jobs
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from tests.databases import KINDS, empty_database
from tests.e2e.cluster import ROOT, Cluster, wait_for
from tests.e2e.conftest import own_redis
from tests.e2e.test_rolling_deploy import paced_job
from tests.faults.checker import EXACT

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.slow]

STEPS = 1_000
SAVE_EVERY = 100


def documented(heading: str) -> str:
    """The commands below a heading of the guide."""
    guide = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = re.search(rf"\*\*{heading}\.\*\*.*?```sh\n(.*?)```", guide, re.DOTALL)
    assert found is not None, f"the guide has no commands below {heading}"
    return found[1]


class Place:
    """An installation's database and data directory, and its processes."""

    def __init__(self, folder: Path, kind: str, stack: ExitStack, **settings: str) -> None:
        folder.mkdir()
        self.data = folder / "data"
        self.url = ""
        if kind == "postgresql":
            url = stack.enter_context(empty_database(kind, folder))
            self.url = url.replace("postgresql+psycopg:", "postgresql:")
        self.cluster = Cluster(
            folder,
            self.url,
            stack.enter_context(own_redis()),
            component_modules=json.dumps(["tests.faults.components"]),
            worker_device="cpu",
            worker_slots=2,
            # A slow machine must not look like a dead worker.
            lease_seconds=10.0,
            **settings,
        )
        stack.callback(self.stop)

    @property
    def sql_url(self) -> str:
        return self.url or f"sqlite:///{self.data / 'halfstep.db'}"

    def start(self) -> None:
        self.cluster.start_api()
        self.cluster.start("dispatch", "halfstep.service.dispatch")
        self.cluster.start_worker("worker")

    def stop(self) -> None:
        if self.cluster.processes:
            self.cluster.stop()
            self.cluster.processes.clear()

    def shell(self, commands: str, copy: Path) -> None:
        done = subprocess.run(
            ["sh", "-eu"],
            input=f'halfstep() {{ "$PYTHON" -m halfstep.service.cli "$@"; }}\n{commands}',
            env={**self.cluster.environment, "COPY": str(copy), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Newest first."""
        found: list[dict[str, Any]] = self.cluster.get(f"/jobs/{job_id}/checkpoints")["items"]
        return found

    def outcome(self, job_id: str) -> dict[str, Any]:
        """What must not depend on whether a job was interrupted: losses, other figures, weights."""
        newest = self.checkpoints(job_id)[0]
        model = self.cluster.client.get(f"/jobs/{job_id}/checkpoints/{newest['step']}/model")
        assert model.status_code == 200, model.text
        columns = self.cluster.columns(job_id)
        assert hashlib.sha256(model.content).hexdigest() == newest["sha256"]
        return {name: columns[name] for name in ("step", *EXACT)} | {"weights": newest["sha256"]}


def need(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        reason = f"the guide's commands need {', '.join(missing)}; install them"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(params=KINDS)
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Place, Place]]:
    """Where the product ran, and where its copy is brought back: another directory, broker and database."""
    need("rsync", *(["pg_dump", "pg_restore"] if request.param == "postgresql" else ["sqlite3"]))
    with ExitStack() as stack:
        yield (
            Place(tmp_path / "old", request.param, stack),
            Place(tmp_path / "new", request.param, stack),
        )


def resumed_with(place: Place, job_id: str) -> list[dict[str, Any]]:
    """The data of the events that tell of going on, and of damage found on the way."""
    events = place.cluster.get(f"/jobs/{job_id}/events")["items"]
    return [
        event["data"]
        for event in events
        if "steps_repeated" in (event["data"] or {})
        or (event["data"] or {}).get("code") == "checkpoint_damaged"
    ]


def test_a_copy_taken_live_is_restored_and_unfinished_jobs_go_on(
    places: tuple[Place, Place], tmp_path: Path
) -> None:
    old, new = places
    copy = tmp_path / "copy"
    copy.mkdir()
    migrate(old.sql_url)
    made = subprocess.run(
        [sys.executable, "-m", "halfstep.service.cli", "keys", "create", "me"],
        env=old.cluster.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for place in places:
        place.cluster.client.headers["authorization"] = f"Bearer {made.stdout.strip()}"
    old.start()
    ended = old.cluster.submit(paced_job("ended", max_steps=20))
    old.cluster.wait(ended)
    gate = tmp_path / "gate"
    held = {"model": {"name": "paced", "params": {"gate": str(gate), "gate_at": STEPS // 2}}}
    long = {
        "max_steps": STEPS,
        "checkpoint_every_steps": SAVE_EVERY,
        "keep_checkpoints": 4,
        "keep_best_checkpoint": False,
    }
    # In its only attempt, which a restore must not cost it.
    whole = old.cluster.submit(paced_job("whole", **long) | held | {"max_attempts": 1})
    damaged = old.cluster.submit(paced_job("damaged", **long) | held)
    queued = old.cluster.submit(paced_job("queued", max_steps=60))

    def has_two(job_id: str) -> bool:
        return len(old.checkpoints(job_id)) >= 2

    for job_id in (whole, damaged):
        wait_for("it has two checkpoints", partial(has_two, job_id), 90)
    define, files, rest = documented("Backup").partition("\ncopy_files\n")
    copy_database, files, nothing = rest.partition("copy_files\n")
    assert nothing == ""
    old.shell(define + "\n" + files + copy_database, copy)
    gate.touch()
    named = {each["step"] for each in old.checkpoints(damaged)}
    wait_for(
        "the job has removed each checkpoint that the copied record names",
        lambda: named.isdisjoint(each["step"] for each in old.checkpoints(damaged)),
        90,
    )
    old.shell(define + "\n" + files, copy)
    undisturbed = {}
    for job_id in (ended, whole, damaged, queued):
        assert old.cluster.wait(job_id)["state"] == "succeeded"
        undisturbed[job_id] = old.outcome(job_id)
    old.stop()
    shutil.rmtree(old.data)

    new.shell(documented("Restore"), copy)
    database = Database(new.sql_url)
    with database.read() as s:
        found = {job_id: jobs.get(s, job_id, tenant=None) for job_id in (ended, whole, damaged, queued)}
        kept = {job_id: jobs.checkpoints(s, job_id) for job_id in (whole, damaged)}
    with database.begin() as s:  # as if the copy were a day old: nothing in it was seen or queued lately
        for column in ("jobs.queued_at", "jobs.publish_due", "workers.last_seen"):
            table, name = column.split(".")
            s.execute(text(f"UPDATE {table} SET {name} = {name} - 86400"))
    database.dispose()
    assert [(str(job.state), job.fence) for job in found.values()] == [
        ("succeeded", 1),
        ("queued", 1),  # held when the copy was taken, and given back
        ("queued", 1),
        ("queued", 0),
    ]
    there = {job_id: [saved for saved in kept[job_id] if (new.data / saved.path).is_dir()] for job_id in kept}
    assert there[whole]
    assert there[damaged], "its job removed them after the record was copied; the first pass has them"
    # A slower copy may lack what a job removed meanwhile: its newest, or in another run all that were named.
    left = [] if new.url == "" else there[damaged][1:]
    for saved in there[damaged]:
        if saved not in left:
            shutil.rmtree(new.data / saved.path)

    new.start()
    assert httpx.get(f"{new.cluster.url}/jobs", timeout=30).status_code == 401
    for job_id in (ended, whole, damaged, queued):
        over = new.cluster.wait(job_id)
        assert (over["state"], over["attempt"]) == ("succeeded", 1), over
        assert new.outcome(job_id) == undisturbed[job_id], over["name"]
    for job_id, present in ((whole, there[whole]), (damaged, left)):
        told = resumed_with(new, job_id)
        fallback = present[0].step if present else 0
        assert [each["step"] for each in told if "steps_repeated" in each] == [fallback]
        passed_over = [saved.step for saved in kept[job_id] if saved.step > fallback]
        assert [(each["step"], each["resumed_from"]) for each in told if "code" in each] == [
            (step, fallback) for step in passed_over
        ]


def test_checkpoints_at_a_url_are_copied_in_the_same_two_passes(tmp_path: Path) -> None:
    """What copies a store is its own means; of a directory that is served as one, rsync."""
    need("rsync", "sqlite3")
    stores = {name: tmp_path / f"store of {name}" for name in ("old", "new")}
    copy, copied_store = tmp_path / "copy", tmp_path / "copied store"
    for directory in (copy, copied_store, stores["new"]):
        directory.mkdir()
    with ExitStack() as stack:
        old, new = (
            Place(tmp_path / name, "sqlite", stack, checkpoint_url=f"file://{directory}")
            for name, directory in stores.items()
        )
        migrate(old.sql_url)
        old.start()
        gate = tmp_path / "gate"
        job_id = old.cluster.submit(
            paced_job(
                "kept",
                max_steps=600,
                checkpoint_every_steps=100,
                keep_checkpoints=2,
                keep_best_checkpoint=False,
            )
            | {"model": {"name": "paced", "params": {"gate": str(gate), "gate_at": 300}}, "max_attempts": 1}
        )
        wait_for("it has two checkpoints", lambda: len(old.checkpoints(job_id)) >= 2, 90)
        define, _, rest = documented("Backup").partition("\ncopy_files\n")
        copy_database, _, _ = rest.partition("copy_files\n")
        # A file may go away meanwhile, as under the data directory.
        copy_store = f"rsync -a '{stores['old']}/' '{copied_store}/' || [ $? -eq 24 ]\n"
        one_pass = f"{define}\ncopy_files\n{copy_store}"
        old.shell(one_pass + copy_database, copy)
        gate.touch()
        named = {each["step"] for each in old.checkpoints(job_id)}
        assert old.cluster.wait(job_id)["state"] == "succeeded"
        assert named.isdisjoint(each["step"] for each in old.checkpoints(job_id))
        old.shell(one_pass, copy)
        undisturbed = old.outcome(job_id)
        old.stop()
        shutil.rmtree(old.data)
        shutil.rmtree(stores["old"])

        assert not list(copy.rglob("model.safetensors"))
        new.shell(f"rsync -a '{copied_store}/' '{stores['new']}/'\n{documented('Restore')}", copy)
        database = Database(new.sql_url)
        with database.read() as s:
            newest, *_ = jobs.checkpoints(s, job_id)
            assert str(jobs.get(s, job_id, tenant=None).state) == "queued"
        database.dispose()
        new.start()
        over = new.cluster.wait(job_id)
        assert (over["state"], over["attempt"]) == ("succeeded", 1), over
        assert new.outcome(job_id) == undisturbed
        assert [each["step"] for each in resumed_with(new, job_id)] == [newest.step]
        assert not list(new.data.rglob("model.safetensors"))
