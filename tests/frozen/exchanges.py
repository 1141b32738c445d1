"""Requests and the answers to them, byte by byte, as a server process of any version gives them.

What differs from run to run, the ids and times of what a request makes, is given names; nothing else is left
out but the headers in LEFT_OUT. Knows no module of the product: 0.1 is asked in the same way.
"""

import http.client
import json
import lzma
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

LEFT_OUT = frozenset({"date", "x-request-id", "connection", "keep-alive", "transfer-encoding", "server"})
QUIET_SECONDS = 1.5
"""After so long without a byte a recording takes it that an open stream has nothing more to tell."""

_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_FAR_AWAY = 4_000_000_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. With `open_end` its answer never ends: it is closed once what is expected has come."""

    method: str = "GET"
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    open_end: bool = False

    def __str__(self) -> str:
        said = [f"{name}: {value}" for name, value in self.headers.items() if name != "authorization"]
        return " ".join([self.method, self.path, *said, *([self.body[:200]] if self.body else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back; the body as Latin-1, so that any bytes are text."""

    status: int
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its answer."""

    ask: Ask
    answer: Answer


class Names:
    """Gives what is younger than `made_at` names that are the same in every run."""

    def __init__(self, made_at: float) -> None:
        self._made_at = made_at
        self._known: dict[bytes, bytes] = {}

    def named(self, text: bytes) -> bytes:
        """`text` with `<new-1>` for the first id that was made since, and `<time>` for each time."""
        return _TIME.sub(self._time, _UUID.sub(self._id, text))

    def real(self, text: str) -> str:
        """`text` with the ids that its names stand for."""
        for made, name in self._known.items():
            text = text.replace(name.decode(), made.decode())
        return text

    def _id(self, found: "re.Match[bytes]") -> bytes:
        milliseconds = uuid.UUID(found[0].decode()).int >> 80
        if milliseconds / 1000 < self._made_at:
            return found[0]
        return self._known.setdefault(found[0], b"<new-%d>" % (len(self._known) + 1))

    def _time(self, found: "re.Match[bytes]") -> bytes:
        at = datetime.fromisoformat(found[0].decode()).timestamp()
        return found[0] if at < self._made_at or at > _FAR_AWAY else b"<time>"


class Server:
    """A server process on loopback."""

    def __init__(self, port: int, names: Names) -> None:
        self.port, self.names = port, names

    def answer(self, ask: Ask, *, expected: Answer | None = None) -> Answer:
        """Send the request; of an open end, wait for as many bytes as are expected."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = None if ask.body is None else ask.body.encode()
            connection.request(ask.method, self.names.real(ask.path), body, dict(ask.headers))
            response = connection.getresponse()
            whole = _open_body(connection, response, expected) if ask.open_end else response.read()
            headers = {
                name.lower(): self.names.named(value.encode("latin-1")).decode("latin-1")
                for name, value in response.getheaders()
                if name.lower() not in LEFT_OUT and (name.lower() != "content-length" or ask.method == "HEAD")
            }
        finally:
            connection.close()
        text = self.names.named(whole).decode("latin-1")
        return Answer(status=response.status, headers=dict(sorted(headers.items())), body=text)


def _open_body(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, expected: Answer | None
) -> bytes:
    assert connection.sock is not None
    connection.sock.settimeout(QUIET_SECONDS if expected is None else 20)
    whole = b""
    while expected is None or len(whole) < len(expected.body):
        try:
            part = response.read1(65_536)
        except TimeoutError:
            break
        if not part:
            break
        whole += part
    return whole


@contextmanager
def serving(
    python: Path | str, module: str, folder: Path, database_url: str, made_at: float, **environment: str
) -> Iterator[Server]:
    """A server over a data directory and a database; nothing listens where its broker should be."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder.parent / f"{folder.name}-server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", module],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("HALFSTEP_")},
                "HALFSTEP_DATA_DIR": str(folder),
                "HALFSTEP_DATABASE_URL": database_url,
                "HALFSTEP_BROKER_URL": "redis://127.0.0.1:1/0",
                "HALFSTEP_PORT": str(port),
                **environment,
            },
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    server = Server(port, Names(made_at))
    try:
        _wait_for(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=40)


def _wait_for(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            server.answer(Ask(path="/health/live"))
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return


def save(path: Path, recorded: Mapping[str, Sequence[Exchange]]) -> None:
    """Write exchanges, compressed."""
    document = {
        group: [[_plain(exchange.ask), _plain(exchange.answer)] for exchange in exchanges]
        for group, exchanges in recorded.items()
    }
    path.write_bytes(lzma.compress(json.dumps(document, indent=0).encode(), preset=9))


def load(path: Path) -> dict[str, list[Exchange]]:
    """Read them back."""
    document = json.loads(lzma.decompress(path.read_bytes()))
    return {
        group: [Exchange(Ask(**ask), Answer(**answer)) for ask, answer in exchanges]
        for group, exchanges in document.items()
    }


def _plain(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
