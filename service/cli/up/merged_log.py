"""One log of several processes on one stream: whole lines only, each with the name of its part."""

import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TextIO

LONGEST_LINE = 64 * 1024
COLOURS = {"up": "1", "broker": "35", "api": "32", "dispatch": "33", "worker": "36"}


class MergedLog:
    """Writes lines of parts to `stream`; JSON lines pass unchanged, console lines get a prefix.

    Attributes:
        on_broken: Called once when the stream's reader has gone; nothing is written after that.
    """

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._json = as_json
        self._colour = not as_json and self._stream.isatty() and "NO_COLOR" not in os.environ
        self.on_broken: Callable[[], None] | None = None
        self._broken = False

    def say(self, event: str) -> None:
        """A line of the supervisor's own."""
        if self._json:
            line = {
                "event": event,
                "process": "up",
                "level": "info",
                "timestamp": datetime.now(UTC).isoformat(),
            }
            self._write(json.dumps(line))
        else:
            self.line("up", event)

    def line(self, part: str, text: str) -> None:
        """A line of a part."""
        if self._json and text.startswith("{"):
            self._write(text)
        elif self._json:
            self._write(json.dumps({"event": text, "process": part}))
        elif self._colour:
            self._write(f"\x1b[{COLOURS.get(part, '37')}m{part:<8}\x1b[0m {text}")
        else:
            self._write(f"{part:<8} {text}")

    def _write(self, text: str) -> None:
        if self._broken:
            return
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except OSError:  # a closed pipe, or a terminal that hung up
            self._broken = True
            if self.on_broken is not None:
                self.on_broken()


class LineReader:
    """Cuts the bytes of one pipe into lines for the log; never waits."""

    def __init__(self, descriptor: int, part: str, log: MergedLog, *, muted: Sequence[str] = ()) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._part = part
        self._log = log
        self._muted = tuple(muted)
        self._rest = b""

    def read(self) -> bool:
        """Pass on what is there; False at the end of the pipe."""
        try:
            data = os.read(self._descriptor, LONGEST_LINE)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE or not data:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._pass_on(line)
        return bool(data)

    def drain(self) -> None:
        """Pass on everything that is there now, and close the pipe."""
        while self.read() and self._more():
            pass
        self._pass_on(self._rest)
        os.close(self._descriptor)

    def _pass_on(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text and not any(part in text for part in self._muted):
            self._log.line(self._part, text)

    def _more(self) -> bool:
        return bool(select.select([self._descriptor], [], [], 0)[0])
