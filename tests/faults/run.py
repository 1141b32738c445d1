"""`python -m tests.faults.run --jobs N --faults M --seed S --database sqlite|postgresql`

Runs jobs, throws faults at them, waits for their ends, and checks what must hold. Prints one table; `--json`
writes the same, `--keep` leaves the folder with every log and the client's history.
"""

import argparse
import json
import math
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halfstep.service.contract.states import TERMINAL
from halfstep.service.store import jobs
from tests.faults import audit
from tests.faults.checker import Evidence, Reference, Violation, check
from tests.faults.client import Client
from tests.faults.injections import Fault, Injector
from tests.faults.installation import Installation
from tests.faults.kinds import DRAIN, KILLS, schedule
from tests.faults.variants import HOPELESS, USUAL, VARIANTS


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    seed: int
    database: str
    seconds: float
    evidence: Evidence
    faults: list[Fault]
    violations: list[Violation]
    refused_writes: int
    restarts: int
    points_hit: int
    references: int  # jobs that only served as the undisturbed run

    def recoveries(self) -> dict[str, list[float]]:
        """Seconds from each kill or drain that hit to the job's next step under a new fence, or its end."""
        found: dict[str, list[float]] = defaultdict(list)
        for fault in self.faults:
            if fault.hit and fault.kind in {*KILLS, DRAIN} and fault.fence is not None:
                after = [
                    change.at - fault.at
                    for change in self.evidence.changes
                    if change.job_id == fault.job_id
                    and change.at >= fault.at
                    and (
                        (change.kind == "steps" and change.fence > fault.fence)
                        or (change.kind == "state" and change.new in TERMINAL)
                    )
                ]
                if after:
                    found[fault.kind].append(min(after))
        return found

    def wasted(self) -> float:
        """Steps stored more than once, as a share of the steps that were needed."""
        taken = sum(c.new - c.old for c in self.evidence.changes if c.kind == "steps")
        needed = sum(len(job.columns["step"]) for job in self.evidence.jobs.values())
        return float(taken - needed) / max(1, needed)

    def must_fail(self) -> dict[str, tuple[int, int]]:
        """Of each variant that must fail: how many jobs there were, and how many failed for its reason."""
        found: dict[str, tuple[int, int]] = {}
        for job in self.evidence.jobs.values():
            code = VARIANTS[job.variant].code
            if code is not None:
                jobs_seen, as_wanted = found.get(job.variant, (0, 0))
                found[job.variant] = jobs_seen + 1, as_wanted + (job.code == code)
        return found

    def summary(self) -> dict[str, Any]:
        """The figures, as `--json` writes them; README's and the table's names are these."""
        recoveries = self.recoveries()
        every = [seconds for kind, each in recoveries.items() if kind in KILLS for seconds in each]
        drained = [fault.drained for fault in self.faults if fault.drained is not None]
        kinds = Counter(fault.kind for fault in self.faults)
        hit = Counter(fault.kind for fault in self.faults if fault.hit)
        return {
            "seed": self.seed,
            "database": self.database,
            "seconds": round(self.seconds, 1),
            "jobs": len(self.evidence.jobs) - self.references,
            "states": dict(Counter(job.state for job in self.evidence.jobs.values())),
            "faults": len(self.faults),
            "hit": sum(hit.values()),
            "kills_that_hit": sum(count for kind, count in hit.items() if kind in KILLS),
            "crash_points_reached": self.points_hit,
            "processes_restarted": self.restarts,
            "recovery_seconds": _quantiles(every),
            "drain_seconds": _quantiles(drained),
            "wasted_steps": round(self.wasted(), 4),
            "refused_writes": self.refused_writes,
            "by_kind": {
                kind: {
                    "injected": count,
                    "hit": hit[kind],
                    "injecting_seconds": round(sum(f.took for f in self.faults if f.kind == kind), 1),
                    **_quantiles(recoveries.get(kind, [])),
                }
                for kind, count in sorted(kinds.items())
            },
            "must_fail": {
                variant: {"jobs": count, "failed_as_wanted": as_wanted}
                for variant, (count, as_wanted) in sorted(self.must_fail().items())
            },
            "violations": [asdict(violation) for violation in self.violations],
        }


class Campaign:
    """One run: references first, then jobs and faults side by side."""

    def __init__(
        self, installation: Installation, *, count: int, seed: int, patience: float, hopeless: float = 0.04
    ) -> None:
        self._installation, self._count, self._patience = installation, count, patience
        self._draw = random.Random(seed)
        self._hopeless = hopeless
        self.client = Client(installation.cluster.url, installation.folder / "history.jsonl")
        self.injector = Injector(installation, self.client, random.Random(seed + 1))
        self.references: dict[str, Reference] = {}
        self._failure: BaseException | None = None
        self._submitted: list[str] = []

    def take_references(self, names: Sequence[str]) -> None:
        """Run one of each variant undisturbed."""
        ids = {name: self.submit(name) for name in names}
        self.wait(list(ids.values()), seconds=180.0)
        for name, job_id in ids.items():
            found = self._installation.look(
                partial(audit.seen, job_id=job_id, data_dir=self._installation.data_dir)
            )
            wanted = "succeeded" if VARIANTS[name].code is None else "failed"
            if (found.state, found.code) != (wanted, VARIANTS[name].code):
                raise AssertionError(f"undisturbed, {name} is {found.state} ({found.code})")
            self.references[name] = audit.reference(found)

    def run(self, kinds: Sequence[str], *, settle: float = 1.0) -> None:
        """Submit `count` jobs and inject `kinds`, spread over them; returns when every job has ended."""
        names = [
            self._draw.choice(sorted(HOPELESS if self._draw.random() < self._hopeless else USUAL))
            for _ in range(self._count)
        ]
        known = sorted(self.references.keys() - HOPELESS.keys())
        names = [name if name in self.references else self._draw.choice(known) for name in names]
        hopeless = sorted(self.references.keys() & HOPELESS.keys())
        if len(names) > 2 * len(hopeless):  # one of each at least, however they were drawn
            for number, name in enumerate(hopeless, start=1):
                names[number * len(names) // (len(hopeless) + 1)] = name
        feeder = threading.Thread(target=self._feed, args=(names,), name="feeder", daemon=True)
        feeder.start()
        for number, kind in enumerate(kinds):
            # All of them before the last jobs are there: what is armed waits for somebody to come by.
            due = 0.9 * number * len(names) / max(1, len(kinds))
            while self._ended() < due - len(self._installation.workers) and feeder.is_alive():
                self.injector.resume_paused()
                time.sleep(0.1)
            time.sleep(self._draw.uniform(0.0, settle))
            self.injector.inject(kind)
            self.injector.resume_paused()
        feeder.join()
        if self._failure is not None:
            raise self._failure
        self._installation.disarm()
        self.wait(self._submitted, seconds=self._patience)

    def _feed(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                # One worker is left for what loses its own: recovery is no wait for others' ends.
                while self._open() >= len(self._installation.workers) - 1 and not (
                    self.injector.crowded.is_set() and self._open() <= 2 * len(self._installation.workers)
                ):
                    time.sleep(0.05)
                self.submit(name)
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            self._failure = error

    def submit(self, name: str) -> str:
        """Submit one job of this variant; returns its id once it is acknowledged."""
        key = f"{name}-{self._draw.getrandbits(64):016x}"
        job_id = self.client.submit(VARIANTS[name].spec, key=key, variant=name)
        self._submitted.append(job_id)
        return job_id

    def _open(self) -> int:
        counted = self._installation.look(jobs.counts)
        return sum(count for state, count in counted.items() if state not in TERMINAL)

    def _ended(self) -> int:
        return len(self._submitted) - self._open() - len(self.references)

    def wait(self, ids: Sequence[str], seconds: float) -> None:
        """Until all have ended, or until nothing ended for `seconds`: the checker says what is missing."""
        patience, left = time.monotonic() + seconds, len(ids) + 1
        while time.monotonic() < patience:
            self.injector.resume_paused()
            now = self._open()
            if not now:
                return
            if now < left:
                patience, left = time.monotonic() + seconds, now
            self.client.ask("GET", f"/jobs/{random.choice(ids)}/stats")
            time.sleep(0.2)


def run(
    folder: Path,
    *,
    database: str,
    count: int,
    faults: int | Sequence[str],
    seed: int,
    workers: int = 3,
    variants: Sequence[str] = tuple(VARIANTS),
    patience: float = 60.0,
    dispatcher: bool = True,
    **settings: object,
) -> Result:
    """A whole run in `folder`; the installation is gone when it returns."""
    began = time.monotonic()
    installation = Installation(folder, database, workers, **settings)
    try:
        installation.start(dispatcher=dispatcher)
        campaign = Campaign(installation, count=count, seed=seed, patience=patience)
        campaign.take_references(variants)
        kinds = schedule(faults, database, random.Random(seed)) if isinstance(faults, int) else faults
        campaign.run(kinds)
        evidence = audit.gather(
            installation.database,
            installation.data_dir,
            history=campaign.client.history,
            references=campaign.references,
        )
        campaign.client.close()
        campaign.injector.judge(evidence.changes)
        return Result(
            seed=seed,
            database=database,
            seconds=time.monotonic() - began,
            evidence=evidence,
            faults=campaign.injector.faults,
            violations=check(evidence),
            refused_writes=installation.refused_writes(),
            restarts=installation.restarts,
            points_hit=len(installation.hits()),
            references=len(variants),
        )
    finally:
        installation.stop()


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"seed {summary['seed']}, {summary['database']}, {summary['jobs']} jobs in {summary['seconds']} s",
        f"faults: {summary['faults']}, hit: {summary['hit']}, kills that hit: {summary['kills_that_hit']}",
        "",
        f"{'fault':<30}{'injected':>9}{'hit':>6}{'p50 s':>9}{'p99 s':>9}",
    ]
    for kind, row in summary["by_kind"].items():
        p50, p99 = (f"{row[q]:.2f}" if row[q] is not None else "" for q in ("p50", "p99"))
        lines.append(f"{kind:<30}{row['injected']:>9}{row['hit']:>6}{p50:>9}{p99:>9}")
    for variant, row in summary["must_fail"].items():
        lines.append(f"{'job: ' + variant:<30}{row['jobs']:>9}{row['failed_as_wanted']:>6}")
    recovery, drain = summary["recovery_seconds"], summary["drain_seconds"]
    lines += [
        "",
        f"states                        {summary['states']}",
        f"recovery from kills p50, p99  {recovery['p50']}, {recovery['p99']} s",
        f"drains p50, p99               {drain['p50']}, {drain['p99']} s",
        f"wasted work                   {summary['wasted_steps']:.2%} of all steps",
        f"crash points reached          {summary['crash_points_reached']}",
        f"processes restarted           {summary['processes_restarted']}",
        f"writes of zombies refused     {summary['refused_writes']}",
        f"violations                    {len(summary['violations'])}",
    ]
    lines += [f"  {v['invariant']}: {v['job_id']}: {v['what']}" for v in summary["violations"][:40]]
    return "\n".join(lines)


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {
        f"p{percent}": round(ordered[math.ceil(len(ordered) * percent / 100) - 1], 2) if ordered else None
        for percent in (50, 99)
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--faults", type=int, default=15)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--only", action="append", help="only this kind of fault; may be repeated")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--patience", type=float, default=90.0, help="seconds without any end: then it is over"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", action="store_true", help="leave the folder with its logs")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    folder = Path(tempfile.mkdtemp(prefix="halfstep-faults-"))
    print(f"seed {seed}, logs in {folder}", flush=True)
    faults: int | list[str] = arguments.faults
    if arguments.only:
        faults = [random.Random(seed + n).choice(arguments.only) for n in range(arguments.faults)]
    # However it is ended, the servers and workers must be gone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    result = run(
        folder,
        database=arguments.database,
        count=arguments.jobs,
        faults=faults,
        seed=seed,
        workers=arguments.workers,
        variants=arguments.variants,
        patience=arguments.patience,
    )
    summary = result.summary()
    print(table(summary))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if not arguments.keep and not result.violations:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
