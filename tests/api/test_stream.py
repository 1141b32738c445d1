"""GET /jobs/{id}/stream: everything once and in order, back after a break, and none left hanging."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from halfstep.service.api.context import Context
from halfstep.service.api.following import changes, event_stream
from halfstep.service.api.following.feed import Feed, Page, parse_token, token
from halfstep.service.errors import StoreUnavailable
from halfstep.service.store import events, jobs, record
from halfstep.service.store.record.following import News, Position
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tenants import keys
from halfstep.worker.job.reporting import Reporter

from .conftest import LIVE, Trainer, step_row

Submit = Callable[..., str]
SOON = 20.0


@dataclass(frozen=True)
class Message:
    kind: str
    id: str
    data: Any


def parsed(text: str) -> list[Message]:
    """The messages of a stream, read as a browser does; comments and `retry` left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            found.append(Message(fields["event"], fields["id"], json.loads(fields["data"])))
    return found


class Listener:
    """One request for a stream, driven as a server drives an application."""

    def __init__(self, app: FastAPI, path: str, **headers: str) -> None:
        route, _, query = path.partition("?")
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": route,
            "raw_path": route.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(b"host", b"127.0.0.1")]
            + [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        self.status = 0
        self.headers: dict[str, str] = {}
        self.text = ""
        self.parts = 0
        self.finished = False
        self.takes = asyncio.Event()
        """Cleared: a client that takes nothing."""
        self.takes.set()
        self._left = asyncio.Event()
        self._arrived = asyncio.Condition()
        self._asked = False

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        async with self._arrived:
            self.parts += 1
            self.text += message.get("body", b"").decode()
            self.finished = not message.get("more_body", False)
            self._arrived.notify_all()
        await self.takes.wait()

    def start(self) -> "asyncio.Task[None]":
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        return self.task

    def leave(self) -> None:
        self._left.set()

    async def until(self, reached: Callable[["Listener"], bool]) -> None:
        async def wait() -> None:
            async with self._arrived:
                await self._arrived.wait_for(lambda: reached(self))

        await asyncio.wait_for(wait(), SOON)

    @property
    def messages(self) -> list[Message]:
        return parsed(self.text)

    def kinds(self) -> list[str]:
        return [message.kind for message in self.messages]

    def steps(self) -> list[int]:
        return [step for m in self.messages if m.kind == "metrics" for step in m.data["columns"]["step"]]


def begun(listener: Listener) -> bool:
    return "state" in listener.kinds()


def kept(messages: list[Message]) -> dict[int, Any]:
    """Losses by step, as the documentation tells a client to keep them."""
    held: dict[int, Any] = {}
    for message in messages:
        if message.kind == "metrics":
            columns = message.data["columns"]
            held = {step: loss for step, loss in held.items() if step < columns["step"][0]}
            held.update(zip(columns["step"], columns["loss"], strict=True))
        elif message.kind == "end":
            held = {step: loss for step, loss in held.items() if step <= message.data["last_step"]}
    return held


@pytest.fixture
def app(client: TestClient) -> FastAPI:
    """The application behind `client`, for listeners on an event loop of their own."""
    served: FastAPI = client.app  # type: ignore[assignment]  # TestClient's app is any ASGI callable
    return served


@pytest.fixture
def context(app: FastAPI) -> Context:
    found: Context = app.state.context
    return found


@asynccontextmanager
async def listening(app: FastAPI, path: str, **headers: str) -> AsyncIterator[Listener]:
    listener = Listener(app, path, **headers)
    listener.start()
    try:
        yield listener
    finally:
        listener.takes.set()
        listener.leave()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(listener.task, SOON)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


@pytest.fixture
def ended(submit: Submit, trainer: Trainer, database: Database) -> str:
    """A job that has ended, with more steps and events than one page holds."""
    job_id = submit()
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 1500)
    with database.begin() as session:
        for number in range(250):
            events.append(session, job_id, type="alert", level="info", message=f"note {number}\nmore")
    trainer.steps(job_id, fence, 1501, 2100, loss=math.nan)
    trainer.end(job_id, fence)
    return job_id


def test_a_job_that_has_ended_is_told_whole(client: TestClient, ended: str) -> None:
    answer = client.get(f"/jobs/{ended}/stream")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert "content-length" not in answer.headers
    assert answer.text.startswith("retry: ")
    messages = parsed(answer.text)
    assert [m.data["state"] for m in messages if m.kind == "state"] == [
        "queued",
        "starting",
        "running",
        "succeeded",
    ]
    told = client.get(f"/jobs/{ended}/events?limit=1000").json()["items"]
    assert [m.data["seq"] for m in messages if m.kind in {"state", "event"}] == [one["seq"] for one in told]
    assert [m.data for m in messages if m.kind == "event"] == [one for one in told if one["type"] != "state"]
    steps = [m.data for m in messages if m.kind == "metrics"]
    assert [page["count"] for page in steps] == [1000, 1000, 100]
    whole = client.get(f"/jobs/{ended}/metrics?limit=10000").json()["columns"]
    for name, column in whole.items():
        assert [value for page in steps for value in page["columns"][name]] == column, name
    assert [m.kind for m in messages].count("end") == 1
    assert messages[-1].kind == "end"
    assert messages[-1].data == {
        "job_id": ended,
        "state": "succeeded",
        "is_terminal": True,
        "status_reason": None,
        "attempt": 1,
        "last_step": 2100,
        "deleted": False,
    }


def test_a_listener_goes_on_after_any_message(client: TestClient, ended: str) -> None:
    path = f"/jobs/{ended}/stream?fields=loss"
    messages = parsed(client.get(path).text)
    some = [0, 1, 2, 100, 199, 200, 250, *range(len(messages) - 5, len(messages) - 1)]
    for index in some:
        again = client.get(path, headers={"last-event-id": messages[index].id})
        assert parsed(again.text) == messages[index + 1 :], index
    # A browser asks again with the same query; the id is the newer word.
    again = client.get(f"{path}&after_step=1", headers={"last-event-id": messages[-2].id})
    assert parsed(again.text) == messages[-1:]
    over = client.get(path, headers={"last-event-id": messages[-1].id})
    assert (over.status_code, over.content) == (204, b"")


def test_a_listener_may_begin_later(client: TestClient, ended: str) -> None:
    last = client.get(f"/jobs/{ended}/events?limit=1000").json()["next_after"]
    query = f"after_step=2098&after_event={last - 1}&fields=step"
    messages = parsed(client.get(f"/jobs/{ended}/stream?{query}").text)
    assert [message.kind for message in messages] == ["state", "metrics", "end"]
    assert messages[1].data["columns"] == {"step": [2099, 2100]}
    beyond = parsed(client.get(f"/jobs/{ended}/stream?after_step=9000&after_event=9000").text)
    assert [message.kind for message in beyond] == ["end"]


@pytest.mark.parametrize(
    "identifier",
    ["x", "s1.e1", "s1.e1.j00000g", "s-1.e1.j{end}", "s1.e99.j{end}", "s1.e1.j{wrong}", "1" * 90],
)
def test_an_id_of_something_else_is_refused(client: TestClient, submit: Submit, identifier: str) -> None:
    job_id = submit()
    client.post(f"/jobs/{job_id}/cancel")
    wrong = f"{(int(job_id[-6:], 16) + 1) % 2**24:06x}"
    answer = client.get(
        f"/jobs/{job_id}/stream",
        headers={"last-event-id": identifier.format(end=job_id[-6:], wrong=wrong)},
    )
    assert answer.status_code == 422
    assert [(e["in"], e["parameter"]) for e in answer.json()["errors"]] == [("header", "last-event-id")]
    assert identifier not in answer.text or identifier == "x"


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("fields=los", "fields"),
        ("fields=,", "fields"),
        ("after_step=-1", "after_step"),
        ("after_step=x", "after_step"),
        ("after_event=99999999999999999999", "after_event"),
        ("limit=5", "limit"),
    ],
)
def test_a_wrong_parameter_is_named(client: TestClient, submit: Submit, query: str, parameter: str) -> None:
    answer = client.get(f"/jobs/{submit()}/stream?{query}")
    assert answer.status_code == 422
    assert [error["parameter"] for error in answer.json()["errors"]] == [parameter]


def test_a_job_that_is_not_there_is_404_whatever_the_id(client: TestClient) -> None:
    absent = "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50"
    for headers in ({}, {"last-event-id": "nonsense"}):
        assert client.get(f"/jobs/{absent}/stream", headers=headers).status_code == 404
    assert client.get("/jobs/x/stream").status_code == 404


def test_what_happens_arrives_as_it_happens(
    app: FastAPI, context: Context, submit: Submit, trainer: Trainer
) -> None:
    job_id = submit()

    async def scenario() -> None:
        async with listening(app, f"/jobs/{job_id}/stream") as listener:
            await listener.until(begun)
            fence = await asyncio.to_thread(trainer.claim, job_id)
            await listener.until(lambda it: it.kinds().count("state") == 3)
            await asyncio.to_thread(trainer.steps, job_id, fence, 1, 3)
            await listener.until(lambda it: it.steps() == [1, 2, 3])
            await asyncio.to_thread(trainer.steps, job_id, fence, 4, 5, loss=math.inf)
            await listener.until(lambda it: it.steps() == [1, 2, 3, 4, 5])
            assert listener.messages[-1].data["columns"]["loss"] == ["Infinity"] * 2
            assert context.watcher.taken == 1
            await asyncio.to_thread(trainer.end, job_id, fence)
            await listener.until(lambda it: it.finished)
            assert listener.kinds()[-2:] == ["state", "end"]
            await asyncio.wait_for(listener.task, SOON)
            assert context.watcher.taken == 0

    run(scenario)


def test_a_listener_of_a_resumed_job_has_its_final_record(
    app: FastAPI, database: Database, submit: Submit, trainer: Trainer
) -> None:
    """One stays, one comes back afterwards, one comes back twice: each gets what was retaken."""
    job_id = submit()

    def take(fence: int, first: int, last: int, loss: float) -> None:
        rows = [step_row(step, loss=loss + step) for step in range(first, last + 1)]
        with database.begin() as session:
            record.append(session, job_id, fence, rows, LIVE)

    def resume(old_fence: int, kept: int) -> int:
        with database.begin() as session:
            jobs.release(session, job_id, old_fence, charge_attempt=True, why="its worker was lost")
        fence = trainer.claim(job_id)
        reporter = Reporter(database, job_id, fence, on_progress=lambda _step, _seconds: None)
        reporter.resumed(kept)
        reporter.close()
        return fence

    async def scenario() -> None:
        path = f"/jobs/{job_id}/stream"
        fence = await asyncio.to_thread(trainer.claim, job_id)
        await asyncio.to_thread(take, fence, 1, 300, 0.0)
        async with listening(app, path) as stays, listening(app, path) as leaves:
            for listener in (stays, leaves):
                await listener.until(lambda it: it.steps()[-1:] == [300])
            leaves.leave()
            await asyncio.wait_for(leaves.task, SOON)
            fence = await asyncio.to_thread(resume, fence, 100)
            # Beyond where they were, before anybody looks.
            await asyncio.to_thread(take, fence, 101, 400, 1000.0)
            await stays.until(lambda it: it.steps()[-1:] == [400])
            cuts = [
                m.data["data"] for m in stays.messages if m.kind == "event" and m.data["type"] == "worker"
            ]
            assert cuts == [{"step": 100, "steps_repeated": 200}]
            assert [m.data["attempt"] for m in stays.messages if m.kind == "state"] == [1, 1, 1, 2, 2, 2]
            assert stays.steps()[300:] == list(range(101, 401))
            async with listening(app, path, last_event_id=leaves.messages[-1].id) as back:
                await back.until(lambda it: it.steps()[-1:] == [400])
                assert back.steps() == list(range(101, 401))
                back.leave()
            fence = await asyncio.to_thread(resume, fence, 350)
            await asyncio.to_thread(trainer.end, job_id, fence)
            await stays.until(lambda it: it.finished)
            async with listening(app, path, last_event_id=back.messages[-1].id) as again:
                await again.until(lambda it: it.finished)
            final = {step: step + (1000.0 if step > 100 else 0.0) for step in range(1, 351)}
            assert kept(stays.messages) == final
            assert kept([*leaves.messages, *back.messages, *again.messages]) == final

    run(scenario)


class Reads:
    """A feed's reading side that counts."""

    def __init__(self, feed: Feed) -> None:
        self.count = 0
        self._inner = feed._read
        feed._read = self

    def __call__(self, query: Callable[[Session], News]) -> News:
        self.count += 1
        return self._inner(query)


def test_listeners_at_one_place_share_one_read(
    app: FastAPI, context: Context, submit: Submit, trainer: Trainer
) -> None:
    job_id = submit()
    reads = Reads(context.feed)

    async def scenario() -> None:
        listeners = [Listener(app, f"/jobs/{job_id}/stream") for _ in range(200)]
        tasks = [listener.start() for listener in listeners]
        for listener in listeners:
            await listener.until(begun)
        first = reads.count
        assert first <= 5
        fence = await asyncio.to_thread(trainer.claim, job_id)
        await asyncio.to_thread(trainer.steps, job_id, fence, 1, 50)
        await asyncio.to_thread(trainer.end, job_id, fence)
        for listener in listeners:
            await listener.until(lambda it: it.finished)
            assert listener.steps() == list(range(1, 51))
        await asyncio.gather(*tasks)
        # However the three writes fell between the rounds of the poller.
        assert reads.count - first <= 6
        assert not context.feed._pages, "with nobody listening nothing is kept"

    run(scenario)


def test_one_listener_too_many_is_asked_to_come_later(
    app: FastAPI, context: Context, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    monkeypatch.setattr(context.watcher, "_most", 2)

    async def scenario() -> None:
        path = f"/jobs/{job_id}/stream"
        async with listening(app, path) as first, listening(app, path) as second:
            for listener in (first, second):
                await listener.until(begun)
            async with listening(app, path) as third:
                await third.until(lambda it: it.finished)
                assert (third.status, int(third.headers["retry-after"]) > 0) == (503, True)
                assert json.loads(third.text)["code"] == "too_many_waiting"
            first.leave()
            await asyncio.wait_for(first.task, SOON)
            async with listening(app, path) as fourth:
                await fourth.until(begun)
        assert context.watcher.taken == 0

    run(scenario)


def test_a_client_that_takes_nothing_is_not_read_for_and_given_up(
    app: FastAPI, context: Context, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(context.feed)
    monkeypatch.setattr(event_stream, "PATIENCE_SECONDS", 0.3)

    async def scenario() -> None:
        listener = Listener(app, f"/jobs/{ended}/stream")
        task = listener.start()
        await listener.until(lambda it: it.kinds() != [])
        listener.takes.clear()
        taken = listener.parts
        await asyncio.wait_for(task, SOON)
        assert not listener.finished
        assert listener.parts <= taken + 1
        assert reads.count <= 2
        assert context.watcher.taken == 0

    run(scenario)


def test_a_job_deleted_behind_a_slow_client_ends_its_stream(
    app: FastAPI, client: TestClient, ended: str
) -> None:
    async def scenario() -> None:
        async with listening(app, f"/jobs/{ended}/stream") as listener:
            listener.takes.clear()
            await listener.until(lambda it: it.text != "")
            answer = await asyncio.to_thread(client.delete, f"/jobs/{ended}")
            assert answer.status_code == 204
            listener.takes.set()
            await listener.until(lambda it: it.finished)
            assert listener.messages[-1].kind == "end"
            assert listener.messages[-1].data["deleted"] is True
            assert listener.messages[-1].data["state"] is None

    run(scenario)


def test_a_quiet_stream_is_kept_alive_while_its_key_is_good(
    app: FastAPI, context: Context, database: Database, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_SECONDS", 0.05)
    with database.begin() as session:
        key, secret = keys.create(session, tenant="default", name="k", scopes=("read",), expires_at=None)

    def revoke() -> None:
        with database.begin() as session:
            keys.revoke(session, key.id)

    async def scenario() -> None:
        path = f"/jobs/{job_id}/stream"
        async with listening(app, path, authorization=f"Bearer {secret}") as listener:
            await listener.until(lambda it: it.text.count(": keep-alive\n\n") >= 3)
            await asyncio.to_thread(revoke)
            await listener.until(lambda it: it.finished)
            assert "end" not in listener.kinds(), "no end: the job goes on, only not for this key"
        async with listening(app, path, authorization=f"Bearer {secret}") as listener:
            await listener.until(lambda it: it.finished)
            assert listener.status == 401

    run(scenario)


def test_a_database_that_is_away_for_a_while_ends_no_stream(
    app: FastAPI, context: Context, submit: Submit, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    monkeypatch.setattr(event_stream, "AWAY_SECONDS", 0.01)
    inner = context.feed._read
    away = 3

    def read(query: Callable[[Session], News]) -> News:
        nonlocal away
        if away:
            away -= 1
            raise StoreUnavailable("away")
        return inner(query)

    monkeypatch.setattr(context.feed, "_read", read)

    async def scenario() -> None:
        async with listening(app, f"/jobs/{job_id}/stream") as listener:
            await listener.until(begun)
            assert listener.text.count(": the database does not answer\n\n") == 3

    run(scenario)


def test_the_end_of_the_process_ends_every_stream(
    app: FastAPI, context: Context, submit: Submit, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    monkeypatch.setattr(changes, "STOP_SECONDS", 0.05)

    async def scenario() -> None:
        async with (
            listening(app, f"/jobs/{job_id}/stream") as quiet,
            listening(app, f"/jobs/{ended}/stream") as stuck,
        ):
            stuck.takes.clear()
            await quiet.until(begun)
            await stuck.until(lambda it: it.text != "")
            context.watcher.stop()
            await quiet.until(lambda it: it.finished)
            assert "end" not in quiet.kinds()
            await asyncio.wait([stuck.task], timeout=SOON)
            assert stuck.task.done()
            assert not stuck.finished
            assert context.watcher.taken == 0

    run(scenario)


def test_a_page_is_read_anew_once_the_job_is_known_to_be_further(context: Context, submit: Submit) -> None:
    job_id = submit()
    reads = Reads(context.feed)
    start = Position(0, 0, settled=0)

    async def scenario() -> None:
        first: Page = await context.feed.page(job_id, start, None, version=0)
        assert await context.feed.page(job_id, start, None, version=first.version) == first
        assert reads.count == 1
        await context.feed.page(job_id, start, None, version=first.version + 1)
        assert reads.count == 2
        await context.feed.page(job_id, start, ["step"], version=0)
        assert reads.count == 3

    run(scenario)


def test_a_listener_that_leaves_takes_nobodys_read_with_it(context: Context, submit: Submit) -> None:
    job_id = submit()
    reads = Reads(context.feed)
    start = Position(0, 0, settled=0)

    async def scenario() -> None:
        leaves, stays = (
            asyncio.create_task(context.feed.page(job_id, start, None, version=0)) for _ in range(2)
        )
        await asyncio.sleep(0)
        leaves.cancel()
        assert (await stays).body
        assert reads.count == 1

    run(scenario)


def test_a_failed_read_is_tried_again_by_the_next(context: Context, submit: Submit) -> None:
    job_id = submit()
    inner = context.feed._read

    def fail(_query: Callable[[Session], News]) -> News:
        raise StoreUnavailable("away")

    async def scenario() -> None:
        context.feed._read = fail
        with pytest.raises(StoreUnavailable):
            await context.feed.page(job_id, Position(0, 0, settled=0), None, version=0)
        context.feed._read = inner
        assert (await context.feed.page(job_id, Position(0, 0, settled=0), None, version=0)).body

    run(scenario)


def test_an_id_says_where_its_listener_is() -> None:
    job_id = "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50"
    text = token(job_id, Position(12, 34, settled=50))
    assert parse_token(job_id, text) == (Position(12, 34, settled=34), False)
    assert parse_token(job_id, text + ".end") == (Position(12, 34, settled=34), True)
    assert parse_token(job_id[:-1] + "1", text) is None
    for wrong in ("", text + ".", text.upper(), text.replace("12", "1" * 17), "\n" + text, text + "\n"):
        assert parse_token(job_id, wrong) is None
