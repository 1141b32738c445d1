"""How often the kernel has ended a process of this control group because memory ran out.

A count that rose while a job's process was killed tells a lack of memory apart from every other SIGKILL.
Version 2 of control groups counts in memory.events, version 1 in memory.oom_control. Where a process is in
neither, on a machine without limits, the machine's own count serves.
"""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def count(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The kernel's count so far; 0 where it keeps none."""
    for path in _candidates(proc, cgroups):
        found = _counter(path)
        if found is not None:
            return found
    return 0


def _candidates(proc: Path, cgroups: Path) -> Iterator[Path]:
    """The files that may hold the count, the narrowest first."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, file = cgroups, "memory.events"
        elif "memory" in controllers.split(","):
            base, file = cgroups / "memory", "memory.oom_control"
        else:
            continue
        yield base / group.lstrip("/") / file
        yield base / file  # in a container the mount begins at its own group, and the path does not hold
    yield proc / "vmstat"


def _counter(path: Path) -> int | None:
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.isdigit():
            return int(value)
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
