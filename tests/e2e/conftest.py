"""What installations in tests run on: a database and a Redis number of their own."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from halfstep.service.store.sql.schema import migrate
from tests.databases import postgres_database as new_postgres_database

LOCAL_SERVER = "redis://127.0.0.1:6379"


@pytest.fixture
def postgres_database() -> Iterator[str]:
    """The URL of a migrated PostgreSQL database, dropped afterwards."""
    with own_postgres() as url:
        yield url


@pytest.fixture
def redis_url() -> Iterator[str]:
    """The URL of a Redis database number that nobody else uses, emptied afterwards."""
    with own_redis() as url:
        yield url


@contextmanager
def own_postgres() -> Iterator[str]:
    """As the fixture; for what lives longer than one test."""
    with new_postgres_database() as url:
        migrate(url)
        yield url


@contextmanager
def own_redis() -> Iterator[str]:
    """As the fixture; for what lives longer than one test."""
    server = os.environ.get("HALFSTEP_TEST_REDIS_URL") or LOCAL_SERVER
    client = redis.Redis.from_url(server, socket_connect_timeout=2)
    try:
        databases = int(str(client.config_get("databases")["databases"]))
    except redis.RedisError as error:
        client.close()
        reason = f"no Redis: {error}; set HALFSTEP_TEST_REDIS_URL"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    client.close()
    for number in random.sample(range(1, databases), databases - 1):
        own = redis.Redis.from_url(server, db=number)
        # Taken for as long as the key lives; two runs on one server get two numbers.
        if own.dbsize() == 0 and own.set("halfstep-test-run", os.getpid(), nx=True, ex=3600):
            try:
                yield f"{server.rstrip('/')}/{number}"
            finally:
                own.flushdb()
                own.close()
            return
        own.close()
    pytest.fail(f"every database number of {server} is in use")
