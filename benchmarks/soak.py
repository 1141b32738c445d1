"""A long tiny job through the product's own processes: does memory stay flat, and is every step there once?

API, dispatcher and worker run as users run them. While the job trains, the resident memory of the job's
process, the worker and the API is read every few seconds; afterwards the whole record is paged over HTTP and
counted. Exits with 1 where a step is missing or doubled. Run by hand: two million steps take an hour or so.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support import report
from benchmarks.support.databases import LOCAL_SERVER
from benchmarks.support.installation import Installation, postgres_database

PAGE = 10_000
WARM = 0.1  # share of the steps after which memory should no longer grow
MOMENTS = (0.1, 0.5, 1.0)
PROCESSES = ("child", "worker", "api")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one look found.

    Attributes:
        step: the newest stored one.
        seconds: since the job was running.
        megabytes: resident memory, by process.
    """

    step: int
    seconds: float
    megabytes: dict[str, float]


def spec(steps: int) -> dict[str, Any]:
    """A job that takes so many steps as fast as steps can be taken, with checkpoints."""
    return {
        "model": {"name": "mlp", "params": {"hidden": [8]}},
        "dataset": {"name": "synthetic", "params": {"samples": 4096, "held_out_samples": 0, "features": 4}},
        "precision": {"precision_level": "fp32"},
        "training": {
            "max_steps": steps,
            "batch_size": 8,
            "deterministic": False,
            "checkpoint_every_seconds": 60,
        },
    }


def main() -> None:
    options = report.options("soak", __doc__)
    options.add_argument("--steps", type=int, default=2_000_000)
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options.add_argument("--postgres", default=LOCAL_SERVER, help="a server on which a database may be made")
    options.add_argument("--every", type=float, default=3.0, help="seconds between two looks at the memory")
    options.add_argument("--threads", type=int, default=1, help="torch threads of the job")
    given = options.parse_args()
    told = report.Report(
        "soak", {name: getattr(given, name) for name in ("steps", "database", "every", "threads")}
    )
    with _installation(given) as installation:
        installation.warm()
        job_id = installation.submit(spec(given.steps))
        samples = list(watch(installation, job_id, given.every))
        job = installation.ended(job_id)
        missing, doubled = faults(_steps(installation, job_id), given.steps)
    add_figures(told, samples, given.steps)
    told.add("steps missing", [len(missing)], unit="steps", better="lower")
    told.add("steps doubled", [len(doubled)], unit="steps", better="lower")
    told.write(given.out)
    if missing or doubled or job["stats"]["current_step"] != given.steps:
        print(f"missing: {missing[:20]}; doubled: {doubled[:20]}; stats: {job['stats']['current_step']}")
        sys.exit(1)


def watch(installation: Installation, job_id: str, every: float) -> Iterator[Sample]:
    """Looks at the processes until the job has ended."""
    began: float | None = None
    while True:
        job = installation.get(f"/jobs/{job_id}")
        if job["is_terminal"]:
            return
        step = job["stats"]["current_step"]
        if step:
            began = began or time.monotonic()
            pids = {name: installation.processes[name].pid for name in ("worker", "api")}
            child = _busiest_child(pids["worker"])
            if child is not None:
                pids["child"] = child
            # The job's process may end between two looks.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                megabytes = {name: _resident(pid) for name, pid in pids.items()}
                yield Sample(step, time.monotonic() - began, megabytes)
        time.sleep(every)


def faults(numbers: Iterable[int], steps: int) -> tuple[list[int], list[int]]:
    """Which of 1..steps are missing, and which numbers came twice or do not belong, both in order."""
    seen = bytearray(steps + 1)
    doubled = []
    for number in numbers:
        if not 1 <= number <= steps or seen[number]:
            doubled.append(number)
        else:
            seen[number] = 1
    return [number for number in range(1, steps + 1) if not seen[number]], sorted(doubled)


def add_figures(told: report.Report, samples: Sequence[Sample], steps: int) -> None:
    """How fast the job was, and each process's memory at MOMENTS and its slope once warm.

    Raises:
        ValueError: fewer than two samples after the warm-up: more steps are needed, or more looks.
    """
    warm = [each for each in samples if each.step >= WARM * steps]
    if len(warm) < 2:
        raise ValueError(f"{len(warm)} samples after the warm-up; take more steps, or look more often")
    first, last = samples[0], samples[-1]
    rate = (last.step - first.step) / (last.seconds - first.seconds)
    told.add("steps per second", [rate], unit="steps/s", better="higher")
    for name in PROCESSES:
        known = [each for each in samples if name in each.megabytes]
        for share in MOMENTS:
            near = min(known, key=lambda each: abs(each.step - share * steps))
            told.add(f"{name}/resident at {share:.0%}", [near.megabytes[name]], unit="MB", better="neither")
        after = [each for each in warm if name in each.megabytes]
        slope = statistics.linear_regression(
            [each.step / 1e6 for each in after], [each.megabytes[name] for each in after]
        ).slope
        told.add(f"{name}/slope once warm", [slope], unit="MB per million steps", better="lower")


def _steps(installation: Installation, job_id: str) -> Iterator[int]:
    after = 0
    while True:
        page = installation.get(f"/jobs/{job_id}/metrics", after_step=after, limit=PAGE, fields="step")
        yield from page["columns"].get("step", ())
        if not page["count"]:
            return
        after = page["next_after_step"]


@contextlib.contextmanager
def _installation(given: argparse.Namespace) -> Iterator[Installation]:
    with contextlib.ExitStack() as stack:
        url = ""
        if given.database == "postgresql":
            url = stack.enter_context(postgres_database(given.postgres))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="halfstep-")))
        yield stack.enter_context(Installation(folder, database_url=url, worker_threads=given.threads))


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES / 1e6


def _busiest_child(parent: int) -> int | None:
    """The one that has computed most: the job's own process, not the warm one beside it."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found[int(entry.name)] = int(fields[11]) + int(fields[12])
    return max(found, key=lambda pid: found[pid], default=None)


if __name__ == "__main__":
    main()
