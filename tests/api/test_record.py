"""`GET /jobs/{id}/metrics`, clause by clause: the columns, pages, ranges, plots, and both other formats."""

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from halfstep.service.api.app import create_app
from halfstep.service.contract import columns
from halfstep.service.contract.columns import Column
from halfstep.service.contract.metrics import FLAG_COLUMNS
from halfstep.service.settings import Settings
from halfstep.service.store import record
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import metric_chunks
from tests.store.test_plots import brute_force

from .conftest import LIVE, Trainer, step_row

Submit = Callable[..., str]

COLUMNS = [
    "step", "epoch", "loss", "scale", "overflow", "nan", "underflow", "skipped", "has_inf", "has_nan",
    "underflow_estimate", "grad_norm", "learning_rate", "memory_usage", "memory_allocated_bytes",
    "memory_reserved_bytes", "step_time_ms", "compute_dtype",
]  # fmt: skip


@pytest.fixture
def running(submit: Submit, trainer: Trainer) -> tuple[str, int]:
    """A job under way, with its fence."""
    job_id = submit()
    return job_id, trainer.claim(job_id)


def spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def test_the_columns_are_those_of_the_contract_with_their_types(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 3, skipped=True)
    columns = client.get(f"/jobs/{job_id}/metrics").json()["columns"]
    assert list(columns) == COLUMNS
    wanted: dict[str, type] = dict.fromkeys(COLUMNS, float)
    wanted |= dict.fromkeys(FLAG_COLUMNS, bool)
    wanted |= {"step": int, "epoch": int, "compute_dtype": str}
    wanted |= dict.fromkeys(("memory_allocated_bytes", "memory_reserved_bytes"), int)
    assert {name: {type(value) for value in column} for name, column in columns.items()} == {
        name: {kind} for name, kind in wanted.items()
    }


def test_a_page_has_a_thousand_steps_unless_asked_and_ten_thousand_at_most(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 10_005)
    pages = {
        query: client.get(f"/jobs/{job_id}/metrics?fields=step{query}").json()
        for query in ("", "&limit=10000", "&limit=1", "&after_step=10000")
    }
    assert {query: page["count"] for query, page in pages.items()} == {
        "": 1000,
        "&limit=10000": 10_000,
        "&limit=1": 1,
        "&after_step=10000": 5,
    }
    assert pages[""]["next_after_step"] == pages[""]["columns"]["step"][-1] == 1000
    assert {page["last_step"] for page in pages.values()} == {10_005}


def test_a_cursor_at_or_beyond_the_end_stays_until_there_is_more(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    for cursor in (0, 5):  # nothing is stored yet; the cursor may have come from another job
        page = client.get(f"/jobs/{job_id}/metrics?after_step={cursor}").json()
        assert (page["count"], page["next_after_step"], page["last_step"]) == (0, cursor, 0)
        assert page["columns"] == {name: [] for name in COLUMNS}
    trainer.steps(job_id, fence, 1, 5)
    for cursor in (5, 6):
        page = client.get(f"/jobs/{job_id}/metrics?after_step={cursor}").json()
        assert (page["count"], page["next_after_step"], page["last_step"]) == (0, cursor, 5)
    trainer.steps(job_id, fence, 6, 7)
    assert client.get(f"/jobs/{job_id}/metrics?after_step=5").json()["columns"]["step"] == [6, 7]
    trainer.end(job_id, fence)
    page = client.get(f"/jobs/{job_id}/metrics?after_step=7").json()
    assert (page["state"], page["is_terminal"], page["count"]) == ("succeeded", True, 0)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("from_step=3&to_step=3", [3]),
        ("from_step=8", [8, 9, 10]),
        ("to_step=2", [1, 2]),
        ("from_step=0&to_step=1", [1]),
        ("from_step=9&to_step=99", [9, 10]),
        ("from_step=11&to_step=12", []),
        ("to_step=0", []),
        ("from_step=2&to_step=9&limit=3", [2, 3, 4]),
        ("after_step=2&limit=2", [3, 4]),
        ("max_points=20&from_step=3&to_step=5", [3, 4, 5]),
        ("max_points=2&from_step=3&to_step=6", [4, 6]),
        ("max_points=2&to_step=0", []),
        ("max_points=2&after_step=10", []),
    ],
)
def test_ranges_include_both_their_ends(
    client: TestClient, running: tuple[str, int], trainer: Trainer, query: str, wanted: list[int]
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 10)
    page = client.get(f"/jobs/{job_id}/metrics?{query}").json()
    assert page["columns"]["step"] == wanted
    assert page["count"] == len(wanted)


def test_fields_come_in_the_records_order_each_once_and_step_always(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 2)
    for fields, wanted in (
        ("scale,loss", ["step", "loss", "scale"]),
        ("loss,loss,", ["step", "loss"]),
        ("step", ["step"]),
        (",".join(reversed(COLUMNS)), COLUMNS),
    ):
        assert list(client.get(f"/jobs/{job_id}/metrics?fields={fields}").json()["columns"]) == wanted


def test_a_plot_keeps_first_last_extremes_and_counts_of_every_bucket_in_each_format(
    client: TestClient, running: tuple[str, int], database: Database
) -> None:
    job_id, fence = running
    rows = [
        step_row(
            n,
            loss=math.nan if n % 13 == 0 or 40 < n <= 60 else math.sin(n),
            grad_norm=math.inf if n == 77 else float(n % 9),
            overflow=n % 7 == 0,
            has_nan=n % 13 == 0,
            memory_allocated_bytes=1000 + n * n % 101,
            compute_dtype="float16" if n < 50 else "float32",
        )
        for n in range(1, 104)
    ]
    with database.begin() as session:
        record.append(session, job_id, fence, rows, LIVE)
    path = f"/jobs/{job_id}/metrics?max_points=10"
    page = client.get(path).json()
    assert (page["downsampled"], page["bucket_steps"], page["count"], page["last_step"]) == (
        True,
        11,
        10,
        103,
    )
    wanted = [
        {name: spelled(value) for name, value in brute_force(rows[first : first + 11]).items()}
        for first in range(0, 103, 11)
    ]
    columns = page["columns"]
    assert [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] == wanted
    lines = client.get(path, headers={"accept": "application/x-ndjson"})
    assert [json.loads(line) for line in lines.text.splitlines()] == wanted
    table = list(csv.DictReader(io.StringIO(client.get(path, headers={"accept": "text/csv"}).text)))
    assert table == [{name: str(value) for name, value in bucket.items()} for bucket in wanted]
    assert (lines.headers["x-last-step"], lines.headers["x-next-after-step"]) == ("103", "103")


def test_csv_spells_flags_and_numbers_as_json_does(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 1, loss=math.nan, grad_norm=-math.inf, overflow=True, scale=0.1)
    path = f"/jobs/{job_id}/metrics?fields=loss,scale,overflow,nan,grad_norm"
    answer = client.get(path, headers={"accept": "text/csv"})
    assert answer.text == "step,loss,scale,overflow,nan,grad_norm\r\n1,NaN,0.1,true,false,-Infinity\r\n"
    empty = client.get(f"{path}&after_step=1", headers={"accept": "text/csv"})
    assert (empty.text, empty.headers["x-next-after-step"]) == (
        "step,loss,scale,overflow,nan,grad_norm\r\n",
        "1",
    )
    empty = client.get(f"{path}&after_step=1", headers={"accept": "application/x-ndjson"})
    assert (empty.status_code, empty.content) == (200, b"")


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("fields=loss,los", "fields"),
        ("fields=", "fields"),
        ("fields=loss_min&max_points=3", "fields"),
        ("max_points=-1", "max_points"),
        ("max_points=10001", "max_points"),
        ("max_points=x", "max_points"),
        ("max_points=", "max_points"),
        ("max_points=2&from_step=3&to_step=2", "to_step"),
        ("max_points=2&after_step=1&to_step=2", "after_step"),
        ("after_step=x", "after_step"),
        ("after_step=1.5", "after_step"),
        ("after_step=01a208d5-00a9-7fe4-b553-af1ba85f6db3", "after_step"),  # of another path's pages
        ("from_step=-1", "from_step"),
        ("to_step=NaN", "to_step"),
        ("limit=", "limit"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(
    client: TestClient, submit: Submit, query: str, parameter: str
) -> None:
    answer = client.get(f"/jobs/{submit()}/metrics?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert [error["parameter"] for error in answer.json()["errors"]] == [parameter]


def test_the_record_of_no_job_is_not_found(client: TestClient) -> None:
    for job_id in ("01a208d5-00a9-7fe4-b553-af1ba85f6db3", "nonsense"):
        assert client.get(f"/jobs/{job_id}/metrics").status_code == 404


def test_an_added_column_is_in_every_format_and_in_the_document(
    client: TestClient,
    running: tuple[str, int],
    trainer: Trainer,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 2)
    added = Column("entropy", "number", "Entropy of the output", unit="nats")
    monkeypatch.setattr(columns, "RECORD", columns.RECORD.plus([added]))
    path = f"/jobs/{job_id}/metrics"
    assert client.get(path).json()["columns"]["entropy"] == [None, None]
    asked = f"{path}?fields=entropy"
    assert client.get(asked, headers={"accept": "text/csv"}).text == "step,entropy\r\n1,\r\n2,\r\n"
    lines = client.get(asked, headers={"accept": "application/x-ndjson"}).text.splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "entropy": None} for n in (1, 2)]
    schemas = create_app(settings).openapi()["components"]["schemas"]
    described = schemas["MetricsPage"]["properties"]["columns"]
    assert list(described["properties"]) == [*COLUMNS, "entropy"]
    assert described["properties"]["entropy"]["description"] == "Entropy of the output, in nats."


def test_steps_of_a_later_version_are_refused_with_the_remedy(
    client: TestClient, running: tuple[str, int], trainer: Trainer, database: Database
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 3)
    with database.begin() as session:
        session.execute(update(metric_chunks).values(payload=b"\x04\x03\x00\x00\x00"))
    answer = client.get(f"/jobs/{job_id}/metrics")
    assert (answer.status_code, answer.json()["code"]) == (501, "record_newer")
    assert "version 4" in answer.json()["detail"]
    assert "upgrade" in answer.json()["detail"]
    assert client.get(f"/jobs/{job_id}/stats").json()["current_step"] == 3
