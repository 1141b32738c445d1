"""wait_seconds: one poller, every waiter woken, none lost, none left behind."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.context import Context
from halfstep.service.api.following.changes import JobWatcher
from halfstep.service.errors import StoreUnavailable

from .conftest import Trainer


class Versions:
    """A stand-in for the database that counts how often it is asked."""

    def __init__(self, **versions: int) -> None:
        self.now = dict(versions)
        self.asked: list[list[str]] = []
        self.fails = 0

    def __call__(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        self.asked.append(list(job_ids))
        if self.fails:
            self.fails -= 1
            raise StoreUnavailable("away")
        return {job_id: self.now[job_id] for job_id in job_ids if job_id in self.now}


def waiters(watcher: JobWatcher) -> int:
    return len(watcher._waiting)


async def never() -> None:
    await asyncio.Event().wait()


async def all_end(waits: Sequence["asyncio.Future[Any]"]) -> None:
    """They end by the change, long before their own time is up."""
    _, pending = await asyncio.wait(waits, timeout=5)
    assert not pending


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_one_round_serves_all_waiters() -> None:
    versions = Versions(a=1, b=1)
    watcher = JobWatcher(versions, poll_seconds=0.01)

    async def scenario() -> None:
        gone = asyncio.ensure_future(never())
        waits = [
            asyncio.ensure_future(watcher.wait(job_id, 1, seconds=15, gone=gone))
            for job_id in "ab"
            for _ in range(300)
        ]
        while len(versions.asked) < 3:
            await asyncio.sleep(0.005)
        assert waiters(watcher) == 600
        assert all(asked == ["a", "b"] for asked in versions.asked)
        versions.now["a"] = 2
        await all_end(waits[:300])
        assert waiters(watcher) == 300
        assert not any(wait.done() for wait in waits[300:])
        del versions.now["b"]  # deleted: its waiters learn of it too
        await all_end(waits)
        assert waiters(watcher) == 0
        rounds = len(versions.asked)
        await asyncio.sleep(0.1)
        assert len(versions.asked) <= rounds + 1, "with nobody waiting nothing is polled"
        versions.now["a"] = 3
        await all_end([asyncio.ensure_future(watcher.wait("a", 2, seconds=15, gone=gone))])
        gone.cancel()

    run(scenario)


def test_time_ends_a_wait_and_so_does_a_client_that_left() -> None:
    watcher = JobWatcher(Versions(a=1), poll_seconds=0.01)

    async def scenario() -> None:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        started = time.monotonic()
        await watcher.wait("a", 1, seconds=0.05, gone=gone)
        assert 0.04 < time.monotonic() - started < 5
        waiting = asyncio.ensure_future(watcher.wait("a", 1, seconds=15, gone=gone))
        await asyncio.sleep(0.03)
        gone.set_result(None)
        await all_end([waiting])
        assert waiters(watcher) == 0

    run(scenario)


def test_one_too_many_is_refused() -> None:
    watcher = JobWatcher(Versions(a=1), poll_seconds=0.01, most=3)

    async def scenario() -> None:
        gone = asyncio.ensure_future(never())

        async def request(seconds: float) -> int | None:
            with watcher.place():
                return await watcher.wait("a", 1, seconds=seconds, gone=gone)

        waits = [asyncio.create_task(request(15)) for _ in range(3)]
        while watcher.taken < 3:
            await asyncio.sleep(0.005)
        with pytest.raises(ProblemError) as caught:
            await request(15)
        assert caught.value.status == 503
        assert int(caught.value.headers["retry-after"]) > 0
        waits[0].cancel()
        await all_end(waits[:1])
        assert await request(0.02) is None
        watcher.stop()
        await all_end(waits)
        assert await request(15) is None
        gone.cancel()

    run(scenario)


def test_who_waits_learns_what_was_reached_and_an_old_answer_wakes_nobody() -> None:
    versions = Versions(a=5)
    watcher = JobWatcher(versions, poll_seconds=0.01)

    async def scenario() -> None:
        gone = asyncio.ensure_future(never())
        assert await watcher.wait("a", 4, seconds=15, gone=gone) == 5
        # The answer of a question asked before the waiter's own look at the job.
        assert await watcher.wait("a", 6, seconds=0.1, gone=gone) is None
        del versions.now["a"]
        reached = await watcher.wait("a", 6, seconds=15, gone=gone)
        assert reached is not None
        assert reached > 2**62
        gone.cancel()

    run(scenario)


def test_who_comes_while_the_database_is_asked_is_not_taken_for_gone() -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(job_ids: Sequence[str]) -> Mapping[str, int]:
        asked.set()
        answer.wait(10)
        return dict.fromkeys(job_ids, 1)

    watcher = JobWatcher(slow, poll_seconds=0.01)

    async def scenario() -> None:
        gone = asyncio.ensure_future(never())
        first = asyncio.ensure_future(watcher.wait("a", 1, seconds=15, gone=gone))
        await asyncio.to_thread(asked.wait)
        second = asyncio.ensure_future(watcher.wait("b", 1, seconds=0.3, gone=gone))
        await asyncio.sleep(0)
        answer.set()
        assert await second is None
        first.cancel()
        gone.cancel()

    run(scenario)


def test_a_database_that_is_away_for_a_while_loses_no_waiter() -> None:
    versions = Versions(a=1)
    versions.fails = 3
    watcher = JobWatcher(versions, poll_seconds=0.01)

    async def scenario() -> None:
        gone = asyncio.ensure_future(never())
        waiting = asyncio.ensure_future(watcher.wait("a", 1, seconds=15, gone=gone))
        while len(versions.asked) < 5:
            await asyncio.sleep(0.005)
        assert not waiting.done()
        versions.now["a"] = 2
        await all_end([waiting])
        gone.cancel()

    run(scenario)


def test_a_change_answers_a_waiting_request(
    client: TestClient, submit: Callable[..., str], trainer: Trainer
) -> None:
    job_id = submit()
    path = f"/jobs/{job_id}/stats?wait_seconds=20"
    etag = client.get(path).headers["etag"]
    context: Context = client.app.state.context  # type: ignore[attr-defined]  # TestClient's app is any ASGI callable
    answers = []

    def ask() -> None:
        answers.append(client.get(path, headers={"if-none-match": etag}))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    while waiters(context.watcher) < 5:
        assert time.monotonic() - started < 15
        time.sleep(0.01)
    trainer.claim(job_id)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert all(answer.headers["etag"] != etag for answer in answers)
    assert time.monotonic() - started < 15


def test_nothing_new_is_304_in_time(client: TestClient, submit: Callable[..., str]) -> None:
    path = f"/jobs/{submit()}/stats"
    etag = client.get(path).headers["etag"]
    started = time.monotonic()
    answer = client.get(f"{path}?wait_seconds=0.3", headers={"if-none-match": etag})
    assert answer.status_code == 304
    assert 0.25 < time.monotonic() - started < 10
    started = time.monotonic()
    assert client.get(f"{path}?wait_seconds=20").status_code == 200, (
        "without an etag there is nothing to wait for"
    )
    assert time.monotonic() - started < 10
    for unfit in ("31", "-1", "nan", "inf", "x"):
        assert client.get(f"{path}?wait_seconds={unfit}").status_code == 422


def test_a_terminal_job_is_not_waited_for(client: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    client.post(f"/jobs/{job_id}/cancel")
    etag = client.get(f"/jobs/{job_id}/stats").headers["etag"]
    started = time.monotonic()
    answer = client.get(f"/jobs/{job_id}/stats?wait_seconds=20", headers={"if-none-match": etag})
    assert answer.status_code == 304
    assert time.monotonic() - started < 10
