"""A load generator: one HTTP/1.1 request, repeated on some connections (`python -m benchmarks.support.load`).

A process of its own, so that it takes figures and not the server's time: one thread, raw sockets, and each
connection sends as soon as it was answered. Told what to do by a JSON line on standard input.
"""

import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

WARM_UP_SECONDS = 0.5
PATIENCE_SECONDS = 60.0

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Load:
    """What to send where.

    Attributes:
        port: on loopback.
        request: the whole request.
        status: of every answer; another one ends the run.
        connections: how many requests are under way at a time.
        seconds: how long, after a warm-up that is not counted.
    """

    port: int
    request: str
    status: int
    connections: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Served:
    """What came of it. Times in milliseconds, of one request from its sending to its last byte.

    Counted is every answer from the end of the warm-up on, those after the load's end included.
    """

    per_second: float
    p50: float
    p99: float
    worst: float


def request(method: str, path: str, body: object = None, **headers: str) -> str:
    """The text of a request."""
    content = "" if body is None else json.dumps(body)
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: 127.0.0.1",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(content)}"]
    return "\r\n".join(lines) + "\r\n\r\n" + content


def measure(load: Load) -> Served:
    """Run a load in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.support.load"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Served(**json.loads(done.stdout))


class _Connection:
    def __init__(self, load: Load) -> None:
        self.socket = socket.create_connection(("127.0.0.1", load.port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._content, self._status = load.request.encode(), b"HTTP/1.1 %d " % load.status
        self._answer = b""
        self.sent = 0.0

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.socket.sendall(self._content)

    def complete(self) -> bool:
        """Take what arrived; whether that was the answer's last byte."""
        part = self.socket.recv(1 << 20)
        # A server that writes its head and its body apart would wait for our delayed acknowledgement.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not part:
            raise RuntimeError("the server closed a connection")
        self._answer += part
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return False
        found = _LENGTH.search(head)
        if len(body) < (int(found[1]) if found else 0):
            return False
        if not head.startswith(self._status):
            raise RuntimeError(self._answer[:500].decode(errors="replace"))
        self._answer = b""
        return True


def _run(load: Load) -> Served:
    selector = selectors.DefaultSelector()
    for _ in range(load.connections):
        connection = _Connection(load)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send()
    times: list[float] = []
    begin = time.perf_counter() + WARM_UP_SECONDS
    end = now = begin + load.seconds
    under_way = load.connections
    # Who is not answered by the end is waited for: a server that stands still is slow, not absent.
    while under_way:
        ready = selector.select(PATIENCE_SECONDS)
        if not ready:
            raise RuntimeError(f"no answer for {PATIENCE_SECONDS} s")
        for key, _ in ready:
            connection = key.data
            if connection.complete():
                now = time.perf_counter()
                if now >= begin:
                    times.append((now - connection.sent) * 1e3)
                if now < end:
                    connection.send()
                else:
                    under_way -= 1
    times.sort()
    p99 = statistics.quantiles(times, n=100, method="inclusive")[-1] if len(times) > 1 else times[0]
    return Served(len(times) / (now - begin), statistics.median(times), p99, times[-1])


if __name__ == "__main__":
    print(json.dumps(asdict(_run(Load(**json.load(sys.stdin))))))
