"""Fault points: nothing at all unless armed, and then exactly as often as the plan says."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfstep.service import faultpoints
from halfstep.service.faultpoints import HITS, VARIABLE, _armed, _off


def plan(directory: Path, name: str, action: str, *, skip: int = 0, times: int = 1) -> None:
    document = {"action": action, "skip": skip, "times": times}
    (directory / name).write_text(json.dumps(document), encoding="ascii")


def hits(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / HITS).read_text(encoding="ascii").splitlines()]


def test_off_it_is_the_empty_function() -> None:
    assert faultpoints.reach is _off


def test_a_plan_is_carried_out_when_its_turn_comes_and_then_gone(tmp_path: Path) -> None:
    reach = _armed(tmp_path)
    plan(tmp_path, "place", "no-space", skip=2, times=2)
    reach("place")
    reach("elsewhere")
    reach("place")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            reach("place")
        assert caught.value.errno == errno.ENOSPC
    reach("place")
    assert [(hit["point"], hit["action"], hit["pid"]) for hit in hits(tmp_path)] == [
        ("place", "no-space", os.getpid())
    ] * 2


def test_an_armed_process_is_killed_on_the_spot(tmp_path: Path) -> None:
    """By the variable alone, and once: the next process comes through."""
    plan(tmp_path, "place", "kill")
    code = "from halfstep.service.faultpoints import reach as r; print(1, flush=True); r('place'); print(2)"
    environment = {**os.environ, VARIABLE: str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        for _ in range(2)
    )
    assert (first.returncode, first.stdout) == (-signal.SIGKILL, "1\n")
    assert (second.returncode, second.stdout) == (0, "1\n2\n")


@pytest.mark.parametrize(("action", "error"), [("io-error", OSError), ("no-memory", MemoryError)])
def test_errors_are_raised_where_the_point_is(tmp_path: Path, action: str, error: type[Exception]) -> None:
    plan(tmp_path, "place", action)
    with pytest.raises(error):
        _armed(tmp_path)("place")
