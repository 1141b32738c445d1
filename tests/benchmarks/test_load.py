"""The load generator: what it counts."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.support.load import Load, measure, request

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@contextmanager
def server(pause: float, answer: bytes = ANSWER) -> Iterator[int]:
    """The port of a server that answers each request after `pause` seconds."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65536):
                time.sleep(pause)
                connection.sendall(answer)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_answers_after_the_end_are_waited_for_and_counted() -> None:
    with server(pause=1.5) as port:
        served = measure(Load(port, request("GET", "/"), 200, connections=2, seconds=0.2))
    assert served.p50 >= 1500
    assert 0 < served.per_second <= 2 / (1.5 - 0.5)


def test_each_connection_asks_again_and_again() -> None:
    with server(pause=0.01) as port:
        served = measure(Load(port, request("GET", "/"), 200, connections=3, seconds=1.0))
    assert 3 < served.per_second <= 3 / 0.01
    assert 10 <= served.p50 <= served.p99
    assert served.p50 <= served.worst


def test_another_status_ends_the_run() -> None:
    wrong = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
    with server(0, wrong) as port, pytest.raises(RuntimeError, match="503"):
        measure(Load(port, request("GET", "/"), 200, connections=1, seconds=0.1))
