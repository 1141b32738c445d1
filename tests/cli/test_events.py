"""`halfstep events`: pages followed by cursor, a service that is away for a moment, and how a line looks."""

import json
from typing import Any

import pytest

from halfstep.service.client import watching
from tests.cli.conftest import Run, Serve
from tests.cli.stub import Answer, Asked

ID = "01a208d3-6485-7a26-8d7f-6d81f0290b39"


def event(seq: int, **fields: Any) -> dict[str, Any]:
    return {
        "job_id": ID,
        "seq": seq,
        "at": "2026-11-02T09:30:00.000000Z",
        "type": "state",
        "level": "info",
        "message": f"number {seq} [x]",
        "data": None,
        "actor": {"kind": "worker", "id": None, "name": "gpu-1", "tenant": None},
        **fields,
    }


def pages(asked: Asked) -> Answer:
    after = dict(asked.query).get("after")
    found_at: dict[str | None, dict[str, Any]] = {
        None: {"items": [event(1), event(2, actor=None)], "next_after": "b"},
        "b": {"items": [event(3)], "next_after": "c"},
    }
    found = found_at.get(after, {"items": [], "next_after": after})
    return Answer(body=found)


def test_every_page_is_shown_until_there_is_no_more(serve: Serve, halfstep: Run) -> None:
    stub = serve(pages)
    ran = halfstep("events", "--type", "state", "--type", "nan")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line.partition(f" {ID} ")[2] for line in lines] == [
        "state number 1 [x] (gpu-1)",
        "state number 2 [x]",
        "state number 3 [x] (gpu-1)",
    ]
    assert [asked.path for asked in stub.asked] == ["/events"] * 3
    assert [value for name, value in stub.asked[0].query if name == "type"] == ["state", "nan"]
    assert "wait_seconds" not in dict(stub.asked[0].query)


def test_json_is_the_services_own_one_event_a_line(serve: Serve, halfstep: Run) -> None:
    serve(pages)
    ran = halfstep("events", "--json", "--after", "b")
    assert [json.loads(line) for line in ran.out.splitlines()] == [event(3)]


def test_following_waits_and_goes_on_after_the_service_was_away(
    serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "FIRST_RETRY_SECONDS", 0.01)
    answers = iter(
        [
            Answer(body={"items": [event(1)], "next_after": "b"}),
            Answer(503, {"title": "Service Unavailable", "detail": "The database did not answer in time."}),
            Answer(body={"items": [], "next_after": "c"}),
            Answer(body={"items": [event(2)], "next_after": "d"}),
            Answer(410, {"title": "Gone", "detail": "Events after this cursor are no longer kept."}),
        ]
    )
    stub = serve(lambda asked: next(answers))
    ran = halfstep("events", "--follow", "--after", "latest")
    assert ran.code == 1
    assert [line.rpartition(" number ")[2] for line in ran.out.splitlines()] == [
        "1 [x] (gpu-1)",
        "2 [x] (gpu-1)",
    ]
    assert "waiting: The database did not answer in time." in ran.err
    assert "no longer kept" in ran.err
    assert [dict(asked.query)["after"] for asked in stub.asked] == ["latest", "b", "b", "c", "d"]
    assert all(float(dict(asked.query)["wait_seconds"]) > 0 for asked in stub.asked)
