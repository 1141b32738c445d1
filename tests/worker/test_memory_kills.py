"""The kernel's count of kills for memory, wherever a machine keeps it, and a real kill where that can be."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfstep.worker.host import memory_kills

V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
V2 = "low 0\nhigh 0\nmax 41\noom 9\noom_kill 4\noom_group_kill 0\n"


def machine(folder: Path, groups: str, files: dict[str, str]) -> int:
    """The count on a machine whose /proc and /sys/fs/cgroup hold these files."""
    for name, content in ({"proc/self/cgroup": groups} | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return memory_kills.count(folder / "proc", folder / "cgroup")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param("0::/\n", {"cgroup/memory.events": V2}, 4, id="container, version 2"),
        pytest.param(
            "0::/system.slice/h.service\n",
            {"cgroup/system.slice/h.service/memory.events": V2, "cgroup/memory.events": "oom_kill 9\n"},
            4,
            id="unit, version 2",
        ),
        pytest.param(
            "7:cpu,cpuacct:/a\n4:memory:/docker/x:y\n0::/\n",
            {"cgroup/memory/docker/x:y/memory.oom_control": V1, "proc/vmstat": "oom_kill 8\n"},
            3,
            id="host, version 1",
        ),
        pytest.param(
            "4:memory:/docker/x\n", {"cgroup/memory/memory.oom_control": V1}, 3, id="container, version 1"
        ),
        pytest.param(
            "0::/\n", {"proc/vmstat": "nr_free 1\noom_kill 5\n"}, 5, id="no limit: the machine's count"
        ),
        pytest.param("0::/\n", {"cgroup/memory.events": "oom 1\noom_kill x\n"}, 0, id="nothing that counts"),
    ],
)
def test_the_count_is_found(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert machine(tmp_path, groups, files) == expected


def test_without_any_file_it_is_nought(tmp_path: Path) -> None:
    assert memory_kills.count(tmp_path / "proc", tmp_path / "cgroup") == 0


LIMITS = {"memory.limit_in_bytes": memory_kills.CGROUPS / "memory", "memory.max": memory_kills.CGROUPS}


@pytest.fixture
def narrow_group() -> Iterator[Path]:
    """A control group of little memory; only root on a machine of its own can make one."""
    for limit, base in LIMITS.items():
        group = base / f"halfstep-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(64 * 2**20))
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no memory control group can be made here")


COUNTED = """
import subprocess, sys
from pathlib import Path
from halfstep.worker.host import memory_kills
Path(sys.argv[1], "cgroup.procs").write_text("0")
before = memory_kills.count()
eater = subprocess.run([sys.executable, "-c", "b = bytearray(2**28)"], env={"PYTHONMALLOC": "malloc"})
print(eater.returncode, memory_kills.count() - before)
"""


def test_a_real_kill_is_counted(narrow_group: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(narrow_group)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["-9", "1"]
