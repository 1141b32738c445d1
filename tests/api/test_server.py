"""The API as a process: starting, answering over a socket, refusing to serve without a key, ending."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from halfstep.service.store.fleet import components, workers
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from halfstep.service.store.tenants import keys

from .catalogue import INFOS
from .conftest import CPU, SPEC, Trainer

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
Start = Callable[..., "Server"]


class Server:
    """One process of the API."""

    def __init__(self, directory: Path, **variables: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = (directory / "api.log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "halfstep.service.api"],
            cwd=ROOT,
            env={
                **os.environ,
                "HALFSTEP_DATA_DIR": str(directory),
                "HALFSTEP_PORT": str(self.port),
                "HALFSTEP_BROKER_URL": "redis://127.0.0.1:1/0",
                "HALFSTEP_LOG_FORMAT": "json",
                **variables,
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def log(self) -> str:
        """All that it has said."""
        self._log.seek(0)
        return self._log.read().decode()

    def until_live(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            try:
                if httpx.get(f"{self.url}/health/live").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        pytest.fail(self.log())

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """The file that a server finds in its data directory."""
    url = f"sqlite:///{tmp_path / 'halfstep.db'}"
    migrate(url)
    opened = Database(url)
    with opened.begin() as session:
        components.publish(session, INFOS)
    yield opened
    opened.dispose()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def begin(**variables: str) -> Server:
        servers.append(Server(tmp_path, **variables))
        return servers[-1]

    yield begin
    for server in servers:
        server.end()


@pytest.mark.usefixtures("database")
def test_it_serves_and_ends_with_its_waiters_answered(start: Start) -> None:
    server = start()
    server.until_live()
    job = httpx.post(f"{server.url}/jobs", json=SPEC).json()
    stats = f"{server.url}{'/jobs/' + job['id']}/stats"
    etag = httpx.get(stats).headers["etag"]
    answers: list[httpx.Response] = []

    def wait() -> None:
        answers.append(httpx.get(f"{stats}?wait_seconds=30", headers={"if-none-match": etag}, timeout=40))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)  # the request is on its way; a late one is answered all the same
    asked = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert time.monotonic() - asked < 15
    waiting.join()
    assert answers[0].status_code == 304
    lines = [json.loads(line) for line in server.log().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {(line["method"], line["path"], line["status"]) for line in requests} >= {("POST", "/jobs", 202)}
    assert all(line["request_id"] for line in requests)


@pytest.mark.usefixtures("database")
def test_an_oversized_body_gets_its_answer_over_a_real_socket(start: Start) -> None:
    server = start()
    server.until_live()
    headers = {"content-type": "application/json"}
    sized = httpx.post(f"{server.url}/jobs", content=b"x" * 5_000_000, headers=headers)
    chunked = httpx.post(f"{server.url}/jobs", content=iter([b"x" * 65536] * 80), headers=headers)
    assert [(answer.status_code, answer.json()["code"]) for answer in (sized, chunked)] == [
        (413, "body_too_large")
    ] * 2
    request = (
        f"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        "Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413"), (
            "a client that asks first is not made to send"
        )
    assert httpx.get(f"{server.url}/jobs").json()["items"] == []


@pytest.mark.usefixtures("database")
def test_a_client_that_leaves_while_sending_leaves_no_trace(start: Start) -> None:
    server = start()
    server.until_live()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        headers = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n"
        connection.sendall(f"POST /jobs HTTP/1.1\r\n{headers}\r\n{{".encode())
    deadline = time.monotonic() + 20
    while '"path": "/jobs"' not in server.log():
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)
    assert "Traceback" not in server.log()
    assert httpx.get(f"{server.url}/jobs").json()["items"] == []


@pytest.mark.usefixtures("database")
def test_a_client_that_leaves_while_waiting_is_not_waited_for(start: Start) -> None:
    server = start(HALFSTEP_LOG_LEVEL="debug")  # each request is a line
    server.until_live()
    path = f"/jobs/{httpx.post(f'{server.url}/jobs', json=SPEC).json()['id']}/stats"
    etag = httpx.get(server.url + path).headers["etag"]

    def answered() -> int:
        lines = [json.loads(line) for line in server.log().splitlines()]
        return sum(line["event"] == "request" and line["path"] == path for line in lines)

    def until_more_than(number: int) -> None:
        """A line is written when its answer is out, so it may come later than that."""
        deadline = time.monotonic() + 15
        while answered() <= number:
            assert time.monotonic() < deadline, server.log()
            time.sleep(0.05)

    until_more_than(0)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"GET {path}?wait_seconds=30 HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: {etag}\r\n\r\n"
        connection.sendall(head.encode())
        time.sleep(0.5)
        assert answered() == 1, "it waits"
    until_more_than(1)


@pytest.mark.usefixtures("database")
def test_a_stream_arrives_at_once_and_ends_with_the_server(start: Start) -> None:
    server = start()
    server.until_live()
    job_id = httpx.post(f"{server.url}/jobs", json=SPEC).json()["id"]
    with httpx.stream("GET", f"{server.url}/jobs/{job_id}/stream", timeout=40) as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("data: ")).startswith('data: {"seq":1,')
        httpx.post(f"{server.url}/jobs/{job_id}/cancel")
        assert "event: end" in lines
        assert list(lines)[-1] == "", "the answer is complete"
    other = httpx.post(f"{server.url}/jobs", json=SPEC).json()["id"]
    with httpx.stream("GET", f"{server.url}/jobs/{other}/stream", timeout=40) as answer:
        lines = answer.iter_lines()
        assert "event: state" in lines
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
        assert not any(line.startswith("event: end") for line in rest)
        assert any(line.startswith(": the server stops") for line in rest)
    assert server.process.wait(15) == 0
    assert "Traceback" not in server.log()


@pytest.mark.usefixtures("database")
def test_a_listener_that_takes_nothing_does_not_hold_up_the_end(
    start: Start, database: Database, tmp_path: Path
) -> None:
    server = start()
    server.until_live()
    job_id = httpx.post(f"{server.url}/jobs", json=SPEC).json()["id"]
    trainer = Trainer(database, tmp_path)
    with database.begin() as session:
        workers.register(session, worker_id="w1", name="w", pid=1, capability=CPU, versions={}, slots=1)
    fence = trainer.claim(job_id)
    for first in range(1, 40_000, 4000):
        trainer.steps(job_id, fence, first, first + 3999)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"GET /jobs/{job_id}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        assert time.monotonic() - asked < 15
    assert "Traceback" not in server.log()


def test_it_ends_while_it_still_waits_for_its_database(start: Start) -> None:
    server = start(HALFSTEP_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    deadline = time.monotonic() + 30
    while "database_unreachable" not in server.log():
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0


def refusal(server: Server) -> str:
    assert server.process.wait(60) == 2, server.log()
    return server.log()


def test_it_refuses_to_serve_others_without_a_key(start: Start, database: Database) -> None:
    assert "halfstep keys create" in refusal(start(HALFSTEP_HOST="0.0.0.0"))
    with database.begin() as session:
        _, secret = keys.create(session, tenant="t", name="k", scopes=("read",), expires_at=None)
    server = start(HALFSTEP_HOST="0.0.0.0")
    server.until_live()
    assert httpx.get(f"{server.url}/jobs").status_code == 401
    authorization: dict[str, Any] = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{server.url}/jobs", headers=authorization).status_code == 200


def test_it_asks_for_a_migration_and_names_a_wrong_setting(start: Start) -> None:
    assert "halfstep migrate" in refusal(start())
    assert "HALFSTEP_LEASE_SECONDS" in refusal(start(HALFSTEP_LEASE_SECONDS="1"))
