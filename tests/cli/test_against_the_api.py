"""The command line against the API itself: what the one prints is what the other stores."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import structlog
from starlette.testclient import TestClient

from halfstep.service.api import create_app
from halfstep.service.contract.metrics import Evaluation
from halfstep.service.settings import Settings
from halfstep.service.store import record
from halfstep.service.store.fleet import components, workers
from halfstep.service.store.sql.database import Database
from tests.api.catalogue import INFOS
from tests.api.conftest import CPU, Trainer
from tests.cli.conftest import Run, Serve
from tests.cli.stub import Answer, Asked
from tests.databases import _migrated_file

__all__ = ["_migrated_file"]


@pytest.fixture
def data(tmp_path: Path, _migrated_file: Path) -> Path:
    shutil.copy(_migrated_file, tmp_path / "halfstep.db")
    return tmp_path


@pytest.fixture
def database(data: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{data / 'halfstep.db'}")
    yield opened
    opened.dispose()


@pytest.fixture(autouse=True)
def service(data: Path, database: Database, serve: Serve) -> Iterator[None]:
    """The API over a database with one worker, at HALFSTEP_URL."""
    with database.begin() as session:
        components.publish(session, INFOS)
        workers.register(
            session,
            worker_id="w1",
            name="host-1",
            pid=7,
            capability=CPU,
            versions={"torch": "2.13.0"},
            slots=1,
        )
    settings = Settings(data_dir=data, broker_url="redis://127.0.0.1:1/0")
    app = create_app(settings, database)
    # The API's log is not what the command prints.
    with (
        structlog.testing.capture_logs(),
        TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000)) as client,
    ):

        def passed_on(asked: Asked) -> Answer:
            headers = {name: asked.headers[name] for name in ("idempotency-key",) if name in asked.headers}
            answer = client.request(
                asked.method, asked.path, params=urlencode(asked.query), headers=headers, json=asked.body
            )
            return Answer(answer.status_code, answer.text, {"content-type": answer.headers["content-type"]})

        serve(passed_on)
        yield


@pytest.fixture
def job_id(tmp_path: Path, halfstep: Run) -> str:
    """A job that the command line has submitted."""
    file = tmp_path / "job.yaml"
    file.write_text("name: digits\nmodel: {name: mlp}\ndataset: {name: digits}\ntags: {team: amp}\n")
    ran = halfstep("submit", str(file), "--json")
    assert ran.code == 0, ran.err
    submitted: dict[str, Any] = json.loads(ran.out)
    return str(submitted["id"])


@pytest.fixture
def trained(job_id: str, database: Database, data: Path) -> str:
    """The same after two evaluations."""
    trainer = Trainer(database, data)
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 20)
    for step, loss in ((10, 0.5), (20, float("nan"))):
        evaluation = Evaluation(
            step=step, split="held_out", loss=loss, metrics={"accuracy": step / 100}, seconds=0.1
        )
        with database.begin() as session:
            record.evaluated(session, job_id, fence, evaluation)
    return job_id


def test_jobs_and_stats_are_those_of_the_api(trained: str, halfstep: Run) -> None:
    listed = halfstep("jobs", "--tag", "team:amp")
    assert listed.code == 0
    assert trained in listed.out
    assert "20" in listed.out
    shown = halfstep("stats", trained[:20])
    assert "loss (held_out)" in shown.out
    assert "NaN at step 20" in shown.out
    assert "accuracy (held_out)  0.2" in shown.out


def test_series_are_listed_and_shown_point_by_point(trained: str, halfstep: Run) -> None:
    lines = halfstep("series", trained).out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["held_out/accuracy", "2", "10", "20", "0.2"],
        ["held_out/loss", "2", "10", "20", "NaN"],
    ]
    assert halfstep("series", trained, "held_out/loss").out == "10\t0.5\n20\tNaN\n"
    document = json.loads(halfstep("series", trained, "held_out/loss", "--json").out)
    assert document["columns"] == {"step": [10, 20], "value": [0.5, "NaN"]}


def test_a_job_without_series_says_so(job_id: str, halfstep: Run) -> None:
    assert halfstep("series", job_id).out == "no series yet\n"
    missing = halfstep("series", job_id, "held_out/loss")
    assert missing.code == 1
    assert "the job has no such series" in missing.err


def test_events_and_control(job_id: str, halfstep: Run) -> None:
    cancelled = halfstep("cancel", job_id)
    assert cancelled.code == 0
    assert "cancelled" in cancelled.out
    assert halfstep("cancel", job_id).code in (0, 1)
    again = halfstep("retry", job_id, "--json")
    assert json.loads(again.out)["name"] == "digits"


def test_a_refusal_names_the_field_and_the_remedy(tmp_path: Path, halfstep: Run) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model: {name: mlp}\ndataset: {name: digits}\ntraining: {epocs: 3}\n")
    ran = halfstep("submit", str(file))
    assert ran.code == 1
    assert "/training/epocs" in ran.err
    assert "epochs" in ran.err
