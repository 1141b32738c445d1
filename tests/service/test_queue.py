"""Sending a wake-up: half a second at most, whatever the broker does, and the job is none the worse."""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kombu.entity import Queue
from kombu.messaging import Consumer

from halfstep.service.queue import QUEUE, RUN_JOB, broker_reachable, enqueue, make_celery
from halfstep.service.settings import Settings
from tests.e2e.conftest import redis_url  # noqa: F401 - a fixture

LIMIT_SECONDS = 3.0  # half a second by design; the rest is a loaded machine's


def timed(settings: Settings, job_id: str) -> tuple[bool, float]:
    began = time.monotonic()
    return enqueue(settings, job_id), time.monotonic() - began


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A broker that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@pytest.mark.redis
def test_a_message_carries_the_job_id_and_nothing_else(tmp_path: Path, redis_url: str) -> None:  # noqa: F811
    settings = Settings(data_dir=tmp_path, broker_url=redis_url)
    assert broker_reachable(settings)
    assert enqueue(settings, "0195-job")
    client = redis.Redis.from_url(redis_url)
    try:
        [message] = client.lrange(QUEUE, 0, -1)
    finally:
        client.close()
    assert b"halfstep.run_job" in message
    assert b"pickle" not in message


@pytest.mark.redis
def test_a_message_is_what_celery_itself_would_send(tmp_path: Path, redis_url: str) -> None:  # noqa: F811
    assert enqueue(Settings(data_dir=tmp_path, broker_url=redis_url), "a", "b")
    celery = make_celery(redis_url)
    for job_id in ("a", "b"):
        celery.send_task(RUN_JOB, args=[job_id], queue=QUEUE, retry=False, ignore_result=True)
    client = redis.Redis.from_url(redis_url)
    try:
        *theirs, second, first = map(json.loads, client.lrange(QUEUE, 0, -1))
    finally:
        client.close()
    ids = set()
    for message in (first, second, *theirs):
        task_id = message["headers"].pop("id")
        assert (message["headers"].pop("root_id"), message["properties"].pop("correlation_id")) == (
            task_id,
        ) * 2
        ids |= {task_id, message["properties"].pop("delivery_tag")}
        # Of the Celery app in this thread, of which there are two here.
        assert uuid.UUID(message["properties"].pop("reply_to"))
    assert [second, first] == theirs
    assert len(ids) == 8


@pytest.mark.redis
def test_several_are_messages_of_their_own_in_order(tmp_path: Path, redis_url: str) -> None:  # noqa: F811
    assert enqueue(Settings(data_dir=tmp_path, broker_url=redis_url), "a", "b", "c")
    read: list[str] = []
    with make_celery(redis_url).connection_for_read() as connection:
        queue = Queue(QUEUE, channel=connection)

        def take(body: list[list[str]], _message: object) -> None:
            read.append(body[0][0])

        with Consumer(connection, queue, callbacks=[take], no_ack=True):
            while len(read) < 3:
                connection.drain_events(timeout=10)
    assert read == ["a", "b", "c"]


@pytest.mark.redis
def test_a_broker_that_comes_back_is_used_again(
    tmp_path: Path,
    redis_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("halfstep.service.queue.BACKOFF_SECONDS", 0.0)
    settings = Settings(data_dir=tmp_path, broker_url=redis_url)
    assert enqueue(settings, "a")
    client = redis.Redis.from_url(redis_url)
    try:
        own = redis_url.rpartition("/")[2]
        for one in client.client_list():
            if one["db"] == own and one["id"] != str(client.client_id()):
                client.client_kill_filter(_id=one["id"])
        outcomes = [enqueue(settings, "b", "c") for _ in range(3)]
        assert outcomes[-1]
        assert client.llen(QUEUE) == 1 + 2 * sum(outcomes)
    finally:
        client.close()


@pytest.mark.redis
def test_a_broker_lost_before_its_answer_is_no_error(
    tmp_path: Path,
    redis_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(data_dir=tmp_path, broker_url=redis_url)
    assert enqueue(settings, "a")

    def lost(*_: object, **__: object) -> None:
        raise redis.ConnectionError("lost")

    monkeypatch.setattr("redis.client.Pipeline.execute", lost)
    assert not enqueue(settings, "b", "c")


@pytest.mark.redis
def test_what_is_no_message_is_dropped_and_the_next_one_read(tmp_path: Path, redis_url: str) -> None:  # noqa: F811
    client = redis.Redis.from_url(redis_url)
    for garbage in (b"\xff\x00", b"{}", b"[1, 2]", b"7", b'{"body": "!", "headers": {}, "properties": {}}'):
        client.lpush(QUEUE, garbage)
    assert enqueue(Settings(data_dir=tmp_path, broker_url=redis_url), "0195-job")
    read: list[object] = []
    with make_celery(redis_url).connection_for_read() as connection:
        queue = Queue(QUEUE, channel=connection)
        with Consumer(connection, queue, callbacks=[lambda body, message: read.append(body)], no_ack=True):
            while not read:
                connection.drain_events(timeout=10)
    assert read[0][0] == ["0195-job"]  # type: ignore[index]
    assert client.llen(QUEUE) == 0
    client.close()


def test_a_refusing_broker_is_told_at_once(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0")
    sent, seconds = timed(settings, "a")
    assert not sent
    assert seconds < LIMIT_SECONDS
    assert not broker_reachable(settings)


def test_a_black_hole_costs_half_a_second_once(tmp_path: Path, black_hole: str) -> None:
    settings = Settings(data_dir=tmp_path, broker_url=black_hole)
    sent, seconds = timed(settings, "a")
    assert not sent
    assert seconds < LIMIT_SECONDS
    sent, seconds = timed(settings, "b")
    assert not sent
    assert seconds < 0.4  # less than one more wait
    assert not broker_reachable(settings)


def test_an_embedded_broker_that_is_not_there(tmp_path: Path) -> None:
    sent, seconds = timed(Settings(data_dir=tmp_path), "a")
    assert not sent
    assert seconds < LIMIT_SECONDS
