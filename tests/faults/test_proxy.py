"""The proxy fails as it is told, and passes everything on otherwise."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(4096):
                    connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    made = Proxy(echo)
    yield made
    made.close()


def _said(proxy: Proxy, connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(4096)


def test_it_passes_bytes_on(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        assert _said(proxy, connection, b"hello") == b"hello"


def test_silent_holds_bytes_back_and_loses_none(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        assert _said(proxy, connection, b"one") == b"one"
        proxy.mode = "silent"
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            _said(proxy, connection, b"two")
        proxy.mode = "pass"
        connection.settimeout(5.0)
        assert connection.recv(4096) == b"two"


def test_cut_and_refuse_end_connections(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        assert _said(proxy, connection, b"one") == b"one"
        proxy.cut()
        assert connection.recv(4096) == b""
    proxy.mode = "refuse"
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        assert connection.recv(4096) == b""
