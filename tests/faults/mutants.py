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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster import ROOT

CARRIED = ("src", "service", "worker", "migrations", "tests", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A break, the run that must notice it, and the invariants of which one must be named."""

    name: str
    patches: tuple[tuple[str, str, str], ...]  # file, old text, new text
    faults: tuple[str, ...]
    red: tuple[str, ...]
    count: int = 6
    number: int = 6  # of faults
    outbox: bool = False  # noticed by `tests.faults.outbox`, which has no kinds of faults


MUTANTS = (
    Mutant(
        "drop the fence",
        (("service/store/job_rows.py", '            jobs.c.fence == bindparam("under"),\n', ""),),
        ("freeze worker and child",),
        ("nothing is written under an old fence",),
    ),
    Mutant(
        "drop the metric key",
        (
            ("service/store/record/writing.py", "    if first != stored.current_step + 1:", "    if False:"),
            ("service/store/record/writing.py", "    if seen <= step:", "    if True:"),
        ),
        ("kill child",),
        (
            "steps are each there once",
            "steps equal the undisturbed run",
            "outcomes are those of the undisturbed run",
            "acknowledged jobs end",
        ),
    ),
    Mutant(
        "acknowledge late with a 5 s timeout, and obey the message",
        (
            ("service/queue.py", '"visibility_timeout": 7 * 86400', '"visibility_timeout": 5'),
            ("service/queue.py", "task_acks_late=False", "task_acks_late=True"),
            (
                "service/store/jobs/leases.py",
                "        .where(jobs.c.id == best, jobs.c.state == JobState.QUEUED)",
                "        .where(jobs.c.id == best if hint is None else jobs.c.id == hint)",
            ),
        ),
        ("duplicate messages", "freeze worker"),
        ("never two live leases", "states move along edges", "fences only rise"),
    ),
    Mutant(
        "skip the fsync",
        (
            (
                "worker/training/checkpoints/writing.py",
                "            os.fsync(file.fileno())",
                "            pass",
            ),
        ),
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
                "worker/training/checkpoints/keeping.py",
                "known, self._training.keep_checkpoints, best=self._training.keep_best_checkpoint",
                "known, 1, best=self._training.keep_best_checkpoint",
            ),
        ),
        ("truncate a checkpoint",),
        ("past its first a checkpoint loads",),
        number=8,
    ),
    Mutant(
        "dispatcher off",
        (
            (
                "service/dispatch/loop.py",
                "    for duty in DUTIES:\n        duty(now)",
                "    for _duty in DUTIES:\n        continue",
            ),
        ),
        ("kill worker", "flush redis"),
        ("acknowledged jobs end",),
    ),
    Mutant(
        "read events by the id that was drawn before the commit",
        (
            (
                "service/store/outbox/sequencing.py",
                "        select(jobs.c.tenant,",
                "        select(outbox_waiting.c.id, jobs.c.tenant,",
            ),
            ("service/store/outbox/sequencing.py", '["tenant",', '["position", "tenant",'),
        ),
        (),
        ("each event is delivered",),
        outbox=True,
    ),
    Mutant(
        "store a consumer's cursor before it has handled",
        (
            (
                "service/dispatch/consuming.py",
                "    if page.entries:\n        consumer.handle(page.entries)\n    try:",
                "    try:",
            ),
            (
                "service/dispatch/consuming.py",
                "    return not page.complete",
                "    if page.entries:\n        consumer.handle(page.entries)\n    return not page.complete",
            ),
        ),
        (),
        ("each event is delivered",),
        outbox=True,
    ),
)


def patched(mutant: Mutant, tree: Path) -> dict[Path, str]:
    """The files that a mutant changes below `tree`, with their new texts.

    Raises:
        LookupError: the old text is not there exactly once: the mutant needs a look.
    """
    texts: dict[Path, str] = {}
    for file, old, new in mutant.patches:
        text = texts.get(tree / file) or (tree / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise LookupError(f"{mutant.name}: {file} has {text.count(old)} times {old!r}")
        texts[tree / file] = text.replace(old, new)
    return texts


def copied(mutant: Mutant | None, tree: Path) -> None:
    """Copy what a run needs into `tree`, an empty folder, with the mutant's patches (None: as it is)."""
    tree.chmod(0o711)  # the run's folders go below it, and PostgreSQL may run as another user
    for each in CARRIED:
        source = ROOT / each
        if source.is_dir():
            shutil.copytree(source, tree / each, symlinks=True)
        else:
            shutil.copy(source, tree / each)
    for file, text in patched(mutant, tree).items() if mutant is not None else ():
        file.write_text(text, encoding="utf-8")


def environment_of(tree: Path) -> dict[str, str]:
    """What a process of the copy is started with: it imports the copy, whatever is installed."""
    path = os.pathsep.join((str(tree / "src"), str(tree)))
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tree)}


def tried(mutant: Mutant | None, command: Sequence[str]) -> list[str]:
    """Which invariants the run `command` on the mutated tree (None: as it is) finds broken, sorted."""
    with tempfile.TemporaryDirectory(prefix="halfstep-mutant-") as name:
        tree = Path(name)
        copied(mutant, tree)
        done = subprocess.run(
            [sys.executable, "-m", *command, "--json", str(tree / "result.json")],
            cwd=tree,
            env=environment_of(tree),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        try:
            result = json.loads((tree / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RuntimeError(f"the run itself failed: {done.stdout[-2000:]}{done.stderr[-4000:]}") from None
        return sorted({violation["invariant"] for violation in result["violations"]})


def _jobs(faults: Sequence[str], *, count: int, number: int, seed: int) -> list[str]:
    only = [argument for fault in faults for argument in ("--only", fault)]
    return [
        *("tests.faults.run", "--jobs", str(count), "--faults", str(number), "--seed", str(seed)),
        *("--workers", "2", "--variants", "plain", "--patience", "20", *only),
    ]


def _outbox(seed: int) -> list[str]:
    # On PostgreSQL: on SQLite transactions are serial, so that none commits late.
    return ["tests.faults.outbox", "--events", "4000", "--database", "postgresql", "--seed", str(seed)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutants")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument(
        "--only", action="append", default=[], help="mutants whose name contains this; may repeat"
    )
    arguments = parser.parse_args()
    chosen = [
        mutant
        for mutant in MUTANTS
        if not arguments.only or any(part in mutant.name for part in arguments.only)
    ]
    failed = 0
    # All of their faults at once, on the tree as it is: what is red below is red for the break alone.
    faults = sorted({fault for mutant in chosen for fault in mutant.faults})
    began = time.monotonic()
    if faults:
        found = tried(None, _jobs(faults, count=12, number=3 * len(faults), seed=arguments.seed))
        failed += bool(found)
        _tell("as it is", faults, f"RED: {', '.join(found)}" if found else "green", began)
    if any(mutant.outbox for mutant in chosen):
        began = time.monotonic()
        found = tried(None, _outbox(arguments.seed))
        failed += bool(found)
        _tell("the outbox as it is", (), f"RED: {', '.join(found)}" if found else "green", began)
    for mutant in chosen:
        began = time.monotonic()
        jobs = _jobs(mutant.faults, count=mutant.count, number=mutant.number, seed=arguments.seed)
        found = tried(mutant, _outbox(arguments.seed) if mutant.outbox else jobs)
        noticed = bool(set(found) & set(mutant.red))
        failed += not noticed
        wanted = "" if noticed else f"GREEN for {' and for '.join(mutant.red)}; "
        _tell(mutant.name, mutant.faults, wanted + ("red: " + ", ".join(found) if found else "none"), began)
    return 1 if failed else 0


def _tell(name: str, faults: Sequence[str], found: str, began: float) -> None:
    print(f"{name} | {', '.join(faults)} | {found} | {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
