"""`GET /jobs/{id}/series` and one series: what there is, points, plots, formats, and what is refused."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from halfstep.service.contract.metrics import Evaluation
from halfstep.service.store import record
from halfstep.service.store.sql.database import Database

from .conftest import Trainer

LOSSES = {2: 0.5, 4: float("nan"), 6: 0.25}


@pytest.fixture
def path(submit: Callable[..., str], trainer: Trainer, database: Database) -> str:
    """The series of a job with three evaluations."""
    job_id = submit()
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 6)
    with database.begin() as session:
        for step, loss in LOSSES.items():
            told = Evaluation(step=step, split="test", loss=loss, metrics={"accuracy": step / 8}, seconds=1.0)
            record.evaluated(session, job_id, fence, told)
    return f"/jobs/{job_id}/series"


def test_the_list_says_what_there_is(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {
        "items": [
            {"name": f"held_out/{name}", "count": 3, "first_step": 2, "last_step": 6, "last_value": value}
            for name, value in (("accuracy", 0.75), ("loss", 0.25))
        ]
    }


def test_points_come_in_every_format(client: TestClient, path: str) -> None:
    loss = f"{path}/held_out/loss"
    page = client.get(loss).json()
    assert page == {
        "name": "held_out/loss",
        "count": 3,
        "columns": {"step": [2, 4, 6], "value": [0.5, "NaN", 0.25]},
        "next_from_step": None,
        "bucket_points": None,
    }
    assert client.get(f"{path}/held_out%2Floss").json() == page
    rows = client.get(loss, headers={"accept": "text/csv"}).text
    assert rows == "step,value\r\n2,0.5\r\n4,NaN\r\n6,0.25\r\n"
    lines = client.get(loss, headers={"accept": "application/x-ndjson"}).text.splitlines()
    assert lines[1] == '{"step":4,"value":"NaN"}'
    part = client.get(loss, params={"from_step": 3, "limit": 1}).json()
    assert (part["columns"]["step"], part["next_from_step"]) == ([4], 6)
    plot = client.get(loss, params={"max_points": 1}).json()["columns"]
    assert (plot["step"], plot["value_min"], plot["value_max"]) == ([6], [0.25], [0.5])


@pytest.mark.parametrize("accept", ["application/json", "text/csv"])
def test_an_answer_at_hand_is_not_sent_again(client: TestClient, path: str, accept: str) -> None:
    loss = f"{path}/held_out/loss"
    etag = client.get(loss, headers={"accept": accept}).headers["etag"]
    again = client.get(loss, headers={"accept": accept, "if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    other = {"application/json": "text/csv", "text/csv": "application/json"}[accept]
    assert client.get(loss, headers={"accept": other, "if-none-match": etag}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("/nope", 404),
        ("/held_out/nope", 404),
        ("/" + "x" * 10_000, 422),
        ("/a%20b", 422),
        ("/held_out/loss?to_step=1&from_step=2", 422),
        ("/held_out/loss?columns=nope", 422),
    ],
)
def test_what_is_not_there_or_wrong_is_refused(
    client: TestClient, path: str, asked: str, status: int
) -> None:
    answer = client.get(path + asked)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert "xxxx" not in answer.text.replace(path + asked, "")
