"""What the full record of every step costs: our loops and others' beside a bare hand-written one.

In each round every loop trains for the same number of steps, in an order drawn anew, and its time is divided
by the bare loop's time of that round. Each number of threads and each precision has a process of its own.

`python -m benchmarks.overhead` compares with the hand-written loops; with the interpreter of an environment
that has requirements-peers.txt installed, with the other libraries as well.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.loops.bare import Bare, Naive
from benchmarks.loops.ours import LOOPS
from benchmarks.loops.peers import present
from benchmarks.loops.works import PRECISIONS, WORKS, Loop, Setting
from benchmarks.support.report import Report, options
from halfstep.worker.host.devices import ALLOCATOR

BASE = "bare, fused"
_STEPS_PER_BLOCK = 32
"""A block is a multiple of the steps between two reads of the record: each block pays for its rows."""


def contestants(*, peers: bool) -> dict[str, Callable[[Setting], Loop]]:
    """Every loop by the name it is shown under; the first is what the others are divided by."""
    loops: dict[str, Callable[[Setting], Loop]] = {
        BASE: Bare,
        "bare, foreach": partial(Bare, fused=False),
        "naive metrics": Naive,
        **LOOPS,
    }
    return loops | (present() if peers else {})


def compare(setting: Setting, *, rounds: int, block_seconds: float, peers: bool) -> dict[str, Any]:
    """Interleaved rounds of every loop; returns seconds per step, by loop and round."""
    loops = {name: make(setting) for name, make in contestants(peers=peers).items()}
    for loop in loops.values():
        loop.run(_STEPS_PER_BLOCK)
    seconds = min(loops[BASE].run(_STEPS_PER_BLOCK) for _ in range(3))
    steps = _STEPS_PER_BLOCK * max(1, round(block_seconds / seconds))
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name in order.sample(list(loops), len(loops)):
            taken[name].append(loops[name].run(steps) / steps)
    return {"steps": steps, "seconds": taken}


def add_figures(report: Report, setting: Setting, threads: int, taken: dict[str, list[float]]) -> None:
    """Each loop's ratio to the bare one by rounds, and the bare loop's own time."""
    place = f"{setting.work}/{setting.precision}/{threads} thread{'s' * (threads > 1)}"
    base = taken.pop(BASE)
    report.add(f"{place}/{BASE}", [1e3 * s for s in base], unit="ms/step", better="neither")
    for name, values in taken.items():
        ratios = [value / bare for value, bare in zip(values, base, strict=True)]
        ours = name.startswith("ours")
        report.add(f"{place}/{name}", ratios, unit="ratio", better="lower" if ours else "neither")


def main() -> None:
    """Command line."""
    parser = options("overhead", __doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--block-seconds", type=float, default=0.15, help="of one loop in one round")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out where installed")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other comparisons")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:  # the process of one comparison
        torch.set_num_threads(arguments.threads[0])
        logging.getLogger("halfstep.worker.amp").setLevel(logging.ERROR)
        setting = Setting(arguments.works[0], arguments.precisions[0])
        result = compare(
            setting,
            rounds=arguments.rounds,
            block_seconds=arguments.block_seconds,
            peers=not arguments.no_peers,
        )
        print("\n" + json.dumps(result))
        return
    settings = {key: value for key, value in vars(arguments).items() if key not in {"out", "add", "only"}}
    report = Report("overhead", settings)
    for work in arguments.works:
        for precision in arguments.precisions:
            for threads in arguments.threads:
                result = _in_process(arguments, work, precision, threads)
                add_figures(report, Setting(work, precision), threads, result["seconds"])
    report.write(arguments.out, add=arguments.add)


def _in_process(arguments: argparse.Namespace, work: str, precision: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.overhead", "--only"]
    command += ["--works", work, "--precisions", precision, "--threads", str(threads)]
    command += ["--rounds", str(arguments.rounds), "--block-seconds", str(arguments.block_seconds)]
    command += ["--no-peers"] * arguments.no_peers
    # Every loop allocates as a job's process does: else the spread is that of page faults, ours and theirs.
    done = subprocess.run(command, env=ALLOCATOR | os.environ, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
