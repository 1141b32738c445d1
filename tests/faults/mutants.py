"""`python -m tests.faults.mutants`: the suite is tested; each of these breaks must turn it red, by name.

A mutant is a patch of the product's source in a copy of the tree. A patch whose old text is gone fails
loudly: then the mutant, not the product, needs a look.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster import ROOT

CARRIED = ("service", "worker", "migrations", "tests", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A break, the run that must notice it, and the invariants of which one must be named."""

    name: str
    patches: tuple[tuple[str, str, str], ...]  # file, old text, new text
    faults: tuple[str, ...]
    red: tuple[str, ...]
    count: int = 6
    number: int = 6  # of faults


MUTANTS = (
    Mutant(
        "drop the fence",
        (
            (
                "service/store/records.py",
                "jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.state.in_(sorted(states))",
                "jobs.c.id == job_id, jobs.c.state.in_(sorted(states))",
            ),
        ),
        ("freeze worker",),
        ("nothing is written under an old fence",),
    ),
    Mutant(
        "drop the metric key",
        (
            ("service/store/metrics.py", "    if first != stored.current_step + 1:", "    if False:"),
            ("service/store/metrics.py", "    if stored.current_step <= step:", "    if True:"),
        ),
        ("kill child",),
        ("steps are each there once", "outcomes are those of the undisturbed run", "acknowledged jobs end"),
    ),
    Mutant(
        "acknowledge late with a 5 s timeout, and obey the message",
        (
            ("service/queue.py", '"visibility_timeout": 7 * 86400', '"visibility_timeout": 5'),
            ("service/queue.py", "task_acks_late=False", "task_acks_late=True"),
            (
                "service/store/leases.py",
                "        .where(jobs.c.id == best, jobs.c.state == JobState.QUEUED)",
                "        .where(jobs.c.id == (hint if len(hint or '') == 36 else best))",
            ),
        ),
        ("strange messages", "freeze worker"),
        ("never two live leases", "states move along edges", "fences only rise"),
    ),
    Mutant(
        "skip the fsync",
        (("worker/training/checkpoint.py", "            os.fsync(file.fileno())", "            pass"),),
        ("power loss",),
        ("past its first a checkpoint loads",),
    ),
    Mutant(
        "restore the random state before the iterator",
        (
            (
                "worker/training/run.py",
                '        randomness.restore(state["rng"], self._device)',
                '        randomness.restore(state["rng"], self._device)\n        torch.randperm(8)',
            ),
        ),
        ("kill child",),
        ("steps equal the undisturbed run",),
    ),
    Mutant(
        "keep one checkpoint",
        (
            (
                "worker/training/run.py",
                "        keep = self._spec.training.keep_checkpoints",
                "        keep = 1",
            ),
        ),
        ("damage a checkpoint",),
        ("past its first a checkpoint loads",),
        number=8,
    ),
    Mutant(
        "dispatcher off",
        (
            (
                "service/dispatch.py",
                "    for job in database.retry(_reap):",
                "    if settings:\n        return\n    for job in database.retry(_reap):",
            ),
        ),
        ("kill worker", "flush redis"),
        ("acknowledged jobs end",),
    ),
)


def tried(mutant: Mutant | None, faults: tuple[str, ...], *, count: int, number: int, seed: int) -> set[str]:
    """The invariants that a run on the mutated tree (None: as it is) finds broken."""
    with tempfile.TemporaryDirectory(prefix="halfstep-mutant-") as name:
        tree = Path(name)
        for each in CARRIED:
            source = ROOT / each
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, tree / each)
        for file, old, new in mutant.patches if mutant is not None else ():
            text = (tree / file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise LookupError(
                    f"{mutant.name if mutant else ''}: {file} has {text.count(old)} times {old!r}"
                )
            (tree / file).write_text(text.replace(old, new), encoding="utf-8")
        only = [argument for fault in faults for argument in ("--only", fault)]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.faults.run"),
                *("--jobs", str(count), "--faults", str(number), "--seed", str(seed), "--workers", "2"),
                *("--variants", "plain", "--patience", "20", "--json", str(tree / "result.json")),
                *only,
            ],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        try:
            result = json.loads((tree / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RuntimeError(f"the run itself failed: {done.stdout[-2000:]}{done.stderr[-4000:]}") from None
        return {violation["invariant"] for violation in result["violations"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutants")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--only", help="mutants whose name contains this")
    arguments = parser.parse_args()
    failed = 0
    for mutant in MUTANTS:
        if arguments.only and arguments.only not in mutant.name:
            continue
        run = {"count": mutant.count, "number": mutant.number, "seed": arguments.seed}
        found = tried(mutant, mutant.faults, **run)
        red = sorted(found & set(mutant.red))
        failed += not red
        print(
            f"{mutant.name:<60} {'red: ' + ', '.join(red) if red else 'GREEN, found ' + str(found)}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
