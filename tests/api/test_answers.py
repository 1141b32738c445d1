"""Every answer is what its model in the contract says, to the byte; and what versions apart make of it."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from halfstep.service.api.answers.wire import json_bytes
from halfstep.service.contract import answers
from halfstep.service.contract.answers import examples
from halfstep.service.contract.states import JobState

from .conftest import Trainer
from .test_stream import parsed


@pytest.fixture
def job_id(client: TestClient, submit: Callable[..., str], trainer: Trainer) -> str:
    """A job that failed, with what JSON has no number for in its record."""
    job_id = submit(tags={"a": "\u00fc"})
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 3, loss=float("nan"), grad_norm=float("inf"), learning_rate=1e-9)
    trainer.checkpoint(job_id, fence, 3)
    trainer.end(job_id, fence, JobState.FAILED, code="non_finite_loss", message="NaN \ud800", detail="3")
    return job_id


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/jobs", answers.JobPage),
        ("/jobs/{}", answers.Job),
        ("/jobs/{}/stats", answers.Stats),
        ("/jobs/{}/metrics", answers.MetricsPage),
        ("/jobs/{}/metrics?max_points=2", answers.MetricsPage),
        ("/jobs/{}/events", answers.EventPage),
        ("/jobs/{}/checkpoints", answers.CheckpointList),
        ("/events", answers.TenantEventPage),
        ("/components", answers.ComponentList),
        ("/workers", answers.WorkerList),
        ("/health/live", answers.Alive),
        ("/health/ready", answers.Readiness),
    ],
)
def test_the_model_reads_an_answer_and_writes_the_same_bytes(
    client: TestClient, job_id: str, path: str, model: type[answers.Answer]
) -> None:
    answer = client.get(path.format(job_id))
    read = model.of(answer.json())
    assert not read.model_extra
    assert json_bytes(read) == answer.content
    assert json_bytes(read.document()) == answer.content


def test_the_messages_of_a_stream_are_of_their_models(client: TestClient, job_id: str) -> None:
    models: dict[str, type[answers.Answer]] = {
        "state": answers.StreamState,
        "event": answers.Event,
        "metrics": answers.StreamMetrics,
        "end": answers.StreamEnd,
    }
    messages = parsed(client.get(f"/jobs/{job_id}/stream").text)
    assert {message.kind for message in messages} == set(models)
    for message in messages:
        assert models[message.kind].of(message.data).document() == message.data


def test_what_only_a_newer_server_says_is_read_past_and_kept() -> None:
    newer = {**examples.JOB, "state": "hibernating", "forecast": {"at": 1}}
    job = answers.Job.of(newer)
    assert job.state == "hibernating"
    assert job.document() == newer
    assert answers.Job.of(examples.JOB).state is JobState.RUNNING


def test_an_optional_field_that_an_older_server_lacks_is_none() -> None:
    older = {name: value for name, value in examples.JOB.items() if name != "from_checkpoint"}
    job = answers.Job.of(older)
    assert job.from_checkpoint is None
    assert job.document() == older


def test_numbers_that_json_lacks_are_numbers_again() -> None:
    stats = answers.Stats.of({**examples.STATS, "loss": "NaN", "grad_norm": "-Infinity"})
    assert stats.loss != stats.loss
    assert stats.grad_norm == float("-inf")
    assert '"loss":"NaN"' in stats.model_dump_json()
