"""A TCP proxy that fails on request: refuses, falls silent, is slow, or cuts every connection."""

import contextlib
import socket
import threading
import time

_CHUNK = 65536


class Proxy:
    """Listens on a port of its own on loopback and passes everything on to another, while it likes.

    `mode` may be set at any time: "pass", "refuse" (new connections are closed), "silent" (bytes in both
    directions wait, as on a network that drops packets) or "slow" (each piece waits `delay` seconds).
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.mode = "pass"
        self.delay = 0.15
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name=f"proxy-{self.port}", daemon=True).start()

    def cut(self) -> None:
        """End every connection that is open now."""
        with self._lock:
            sockets, self._open = self._open, set()
        for each in sockets:
            _end(each)

    def close(self) -> None:
        """Stop listening and cut."""
        _end(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                inward, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                _end(inward)
                continue
            try:
                outward = socket.create_connection(("127.0.0.1", self.target_port), timeout=2.0)
            except OSError:
                _end(inward)
                continue
            outward.settimeout(None)
            with self._lock:
                self._open |= {inward, outward}
            for source, sink in ((inward, outward), (outward, inward)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                while self.mode == "silent":
                    time.sleep(0.02)
                if self.mode == "slow":
                    time.sleep(self.delay)
                sink.sendall(data)
        with self._lock:
            self._open -= {source, sink}
        _end(source)
        _end(sink)


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
