"""The merged log: whole lines, named, whatever way the bytes come."""

import io
import json
import os
from typing import Any

import pytest

from halfstep.service.cli.up.merged_log import LONGEST_LINE, LineReader, MergedLog


class Pipe:
    def __init__(self, log: MergedLog, **options: Any) -> None:
        read_end, self.write_end = os.pipe()
        self.reader = LineReader(read_end, "api", log, **options)

    def write(self, data: bytes) -> None:
        os.write(self.write_end, data)
        self.reader.read()

    def close(self) -> None:
        os.close(self.write_end)
        self.reader.drain()


def test_lines_are_put_together_and_named() -> None:
    stream = io.StringIO()
    pipe = Pipe(MergedLog(stream))
    for part in (b"one\ntw", b"o\n\n", b"thr", "é".encode()[:1], "é".encode()[1:]):
        pipe.write(part)
    assert stream.getvalue() == "api      one\napi      two\n"
    pipe.close()
    assert stream.getvalue() == "api      one\napi      two\napi      thré\n"


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    stream = io.StringIO()
    pipe = Pipe(MergedLog(stream))
    for _ in range(40):
        pipe.write(b"x" * 4096)
    pipe.close()
    lines = stream.getvalue().splitlines()
    assert sum(line.count("x") for line in lines) == 40 * 4096
    assert max(map(len, lines)) <= LONGEST_LINE + 4096 + 9


def test_muted_lines_are_left_out() -> None:
    stream = io.StringIO()
    pipe = Pipe(MergedLog(stream), muted=("overcommit",))
    pipe.write(b"# WARNING overcommit is off\nready\n")
    pipe.close()
    assert stream.getvalue() == "api      ready\n"


def test_json_lines_pass_and_others_are_wrapped() -> None:
    stream = io.StringIO()
    log = MergedLog(stream, as_json=True)
    pipe = Pipe(log)
    pipe.write(b'{"event": "a"}\nTraceback\n')
    pipe.close()
    log.say("stopped")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert first == {"event": "a"}
    assert second == {"event": "Traceback", "process": "api"}
    assert (third["event"], third["process"]) == ("stopped", "up")


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_left_is_reported_once() -> None:
    log = MergedLog(Gone())
    told: list[int] = []
    log.on_broken = lambda: told.append(1)
    log.say("a")
    log.say("b")
    assert told == [1]


@pytest.mark.parametrize("length", [0, 1])
def test_reading_never_waits(length: int) -> None:
    pipe = Pipe(MergedLog(io.StringIO()))
    os.write(pipe.write_end, b"x" * length)
    assert pipe.reader.read() is True
    assert pipe.reader.read() is True
    pipe.close()
