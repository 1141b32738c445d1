"""GET /events: all jobs of a tenant in one order, resumed without a gap, by page, by wait and by stream."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.store import events, jobs, outbox
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import outbox as outbox_rows
from tests.store.making import spec

from .conftest import SPEC
from .test_access import NewKey, anywhere, new_key
from .test_stream import Listener

__all__ = ["anywhere", "new_key"]


def submitted(database: Database) -> str:
    """A job of the tenant of a server without keys; one event."""
    with database.acting(LOCAL).begin() as s:
        return jobs.submit(s, tenant="default", spec=spec())[0].id


LOCAL = Actor(ActorKind.LOCAL, tenant="default")


def told(database: Database, job_id: str, message: str, **fields: Any) -> None:
    with database.begin() as s:
        events.append(s, job_id, **{"type": "alert", "level": "info", "message": message} | fields)


def page(client: TestClient, after: str | None = None, **params: Any) -> dict[str, Any]:
    if after is not None:
        params["after"] = after
    answer = client.get("/events", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def seen(found: dict[str, Any]) -> list[tuple[str, int]]:
    return [(item["job_id"], item["seq"]) for item in found["items"]]


def test_the_events_of_all_jobs_come_in_one_order_with_who_did_it(
    client: TestClient, database: Database
) -> None:
    first, second = submitted(database), submitted(database)
    worker = Actor(ActorKind.WORKER, name="gpu-1")
    told(database.acting(worker), first, "look", data={"figure": float("inf")})
    client.post(f"/jobs/{second}/cancel")
    found = page(client)
    assert seen(found) == [(first, 1), (second, 1), (first, 2), (second, 2)]
    assert [item["actor"] for item in found["items"]] == [
        LOCAL.document(),
        LOCAL.document(),
        {"kind": "worker", "id": None, "name": "gpu-1", "tenant": None},
        LOCAL.document(),
    ]
    item = found["items"][2]
    of_job = client.get(f"/jobs/{first}/events").json()["items"][1]
    assert {key: item[key] for key in of_job} == of_job
    assert item["data"] == {"figure": "Infinity"}


def test_a_cursor_leads_on_without_a_gap_or_a_repeat(client: TestClient, database: Database) -> None:
    job_id = submitted(database)
    for number in range(7):
        told(database, job_id, str(number))
    collected: list[tuple[str, int]] = []
    after = None
    for _ in range(3):
        found = page(client, after, limit=3)
        collected += seen(found)
        after = found["next_after"]
    assert collected == [(job_id, seq) for seq in range(1, 9)]
    assert page(client, after) == {"items": [], "next_after": after}
    told(database, job_id, "later")
    assert seen(page(client, after)) == [(job_id, 9)]


def test_only_the_types_that_are_named_and_the_cursor_goes_on_all_the_same(
    client: TestClient, database: Database
) -> None:
    job_id = submitted(database)
    told(database, job_id, "look")
    found = page(client, type=["alert", "nan"])
    assert seen(found) == [(job_id, 2)]
    found = page(client, type="nan")
    assert found["items"] == []
    told(database, job_id, "later", type="nan")
    assert seen(page(client, found["next_after"])) == [(job_id, 3)]


def test_latest_begins_with_what_happens_from_now_on(client: TestClient, database: Database) -> None:
    job_id = submitted(database)
    found = page(client, "latest")
    assert found["items"] == []
    told(database, job_id, "later")
    assert seen(page(client, found["next_after"])) == [(job_id, 2)]


def test_a_tenant_sees_its_own_and_no_cursor_of_another_is_taken(
    anywhere: TestClient, new_key: NewKey
) -> None:
    mine, theirs = new_key("acme"), new_key("other", scopes=("read", "submit", "admin"))
    job_id = anywhere.post("/jobs", json=SPEC, headers=mine).json()["id"]
    assert anywhere.post("/jobs", json=SPEC, headers=theirs).status_code == 202
    found = anywhere.get("/events", headers=mine).json()
    assert {item["job_id"] for item in found["items"]} == {job_id}
    item = found["items"][-1]
    assert (item["actor"]["kind"], item["actor"]["name"], item["actor"]["tenant"]) == ("key", "k", "acme")
    refused = anywhere.get("/events", params={"after": found["next_after"]}, headers=theirs)
    assert refused.status_code == 422
    [error] = refused.json()["errors"]
    assert (error["in"], error["parameter"]) == ("query", "after")
    assert error["detail"].startswith("is a cursor of another tenant's events")
    assert "acme" not in base64.urlsafe_b64decode(found["next_after"] + "==").decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "é",
        "WzEsMl0",
        base64.urlsafe_b64encode(b'[true,"37a8eec1ce19"]').decode(),
        base64.urlsafe_b64encode(b'[-1,"37a8eec1ce19"]').decode(),
        base64.urlsafe_b64encode(b"[" * 99).decode(),
        base64.urlsafe_b64encode(b'{"a":1,"b":2}').decode(),
    ],
)
def test_what_is_no_cursor_is_refused_and_named(client: TestClient, cursor: str) -> None:
    answer = client.get("/events", params={"after": cursor})
    assert answer.status_code == 422
    [error] = answer.json()["errors"]
    assert error["parameter"] == "after"
    assert "next_after" in error["detail"]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"type": "alarm"}, "type"),
        ({"limit": "1001"}, "limit"),
        ({"wait_seconds": "31"}, "wait_seconds"),
        ({"after": "x" * 201}, "after"),
        ({"tenant": "other"}, "tenant"),
    ],
)
def test_a_wrong_parameter_is_named(client: TestClient, params: dict[str, str], named: str) -> None:
    answer = client.get("/events", params=params)
    assert answer.status_code == 422
    assert [error["parameter"] for error in answer.json()["errors"]] == [named]


def test_a_cursor_whose_events_are_no_longer_kept_is_told_of_the_gap(
    client: TestClient, database: Database
) -> None:
    job_id = submitted(database)
    after = page(client)["next_after"]
    told(database, job_id, "missed")
    newest = page(client)["next_after"]
    with database.begin() as s:
        s.execute(update(outbox_rows).values(at=0.0))
    with database.begin() as s:
        assert outbox.remove_old(s, days=7, most_days=30, limit=100) == 2
    answer = client.get("/events", params={"after": after})
    assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")
    assert page(client, newest)["items"] == []  # it missed nothing
    told(database, job_id, "later")
    assert seen(page(client)) == seen(page(client, newest)) == [(job_id, 3)]


def test_a_cursor_of_what_a_restored_copy_has_not_seen_is_refused(
    client: TestClient, database: Database
) -> None:
    submitted(database)
    after = page(client)["next_after"]
    with database.begin() as s:
        s.execute(outbox_rows.delete())
    answer = client.get("/events", params={"after": after})
    assert (answer.status_code, answer.json()["code"]) == (410, "cursor_ahead")


def test_who_waits_is_answered_as_soon_as_there_is_an_event(client: TestClient, database: Database) -> None:
    job_id = submitted(database)
    after = page(client)["next_after"]
    answers: list[dict[str, Any]] = []
    waiting = threading.Thread(
        target=lambda: answers.append(page(client, after, wait_seconds=30, type="nan"))
    )
    waiting.start()
    watcher = client.app.state.context.watcher  # type: ignore[attr-defined]  # FastAPI
    while not watcher.taken:
        assert waiting.is_alive()
        time.sleep(0.01)
    told(database, job_id, "of another type")
    told(database, job_id, "of this one", type="nan")
    waiting.join(timeout=25)
    assert [seen(answer) for answer in answers] == [[(job_id, 3)]]


def test_who_waits_for_nothing_gets_a_cursor_that_leads_on(client: TestClient, database: Database) -> None:
    job_id = submitted(database)
    found = page(client, page(client)["next_after"], wait_seconds=0.3)
    assert found["items"] == []
    told(database, job_id, "later")
    assert seen(page(client, found["next_after"])) == [(job_id, 2)]


def scenario(work: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(work(), 40))


def test_a_stream_tells_what_was_and_what_comes_and_is_resumed_without_a_gap(
    client: TestClient, database: Database
) -> None:
    job_id = submitted(database)
    told(database, job_id, "second")

    async def follow() -> None:
        listener = Listener(client.app, "/events", accept="text/event-stream")  # type: ignore[arg-type]  # FastAPI
        listener.start()
        await listener.until(lambda it: len(it.messages) == 2)
        await asyncio.to_thread(told, database, job_id, "third")
        await listener.until(lambda it: len(it.messages) == 3)
        assert listener.headers["content-type"].startswith("text/event-stream")
        assert [(each.kind, each.data["seq"]) for each in listener.messages] == [
            ("event", 1),
            ("event", 2),
            ("event", 3),
        ]
        assert listener.messages[0].data == page(client)["items"][0]
        again = Listener(
            client.app,  # type: ignore[arg-type]  # as above
            "/events?type=alert",
            accept="text/event-stream",
            last_event_id=listener.messages[1].id,
        )
        again.start()
        await again.until(lambda it: len(it.messages) == 1)
        assert again.messages[0].data["message"] == "third"
        for each in (listener, again):
            each.leave()
            await each.task

    scenario(follow)


def test_a_wrong_last_event_id_is_refused_and_named(client: TestClient) -> None:
    answer = client.get("/events", headers={"accept": "text/event-stream", "last-event-id": "s1.e2"})
    assert answer.status_code == 422
    assert [(error["in"], error["parameter"]) for error in answer.json()["errors"]] == [
        ("header", "last-event-id")
    ]


def test_another_media_type_is_not_acceptable(client: TestClient) -> None:
    assert client.get("/events", headers={"accept": "text/csv"}).status_code == 406


def test_events_written_while_pages_are_read_are_neither_skipped_nor_repeated(
    client: TestClient, database: Database
) -> None:
    job_ids = [submitted(database) for _ in range(3)]

    def tell(job_id: str) -> None:
        for number in range(30):
            told(database, job_id, str(number))

    writers = [threading.Thread(target=tell, args=(job_id,)) for job_id in job_ids]
    for writer in writers:
        writer.start()
    collected: list[tuple[str, int]] = []
    after = None
    while len(collected) < 93:
        found = page(client, after, limit=10, wait_seconds=20)
        assert found["items"], "nothing came for 20 seconds"
        collected += seen(found)
        after = found["next_after"]
    for writer in writers:
        writer.join()
    assert len(set(collected)) == len(collected) == 93
    for job_id in job_ids:
        assert [seq for each, seq in collected if each == job_id] == list(range(1, 32))
    assert json.loads(base64.urlsafe_b64decode(str(after) + "=="))[0] > 0
