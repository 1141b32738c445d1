"""`python -m tests.faults.points [--database sqlite|postgresql]`: every crash point, once and twice in a row.

At each point a process is killed, and in a second pass the next one that comes by as well, while one small
job is under way; then everything is looked at by the checker of all other runs. Points are taken one after
another in one installation, so that what is found broken is one point's.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from halfstep.service.contract.states import TERMINAL
from halfstep.service.store import jobs
from halfstep.service.store.fleet import workers
from tests.faults import audit
from tests.faults.checker import Change, Violation, check
from tests.faults.installation import LEASE_SECONDS, Installation
from tests.faults.kinds import POINTS
from tests.faults.run import Campaign
from tests.faults.variants import SAVE_EVERY

VARIANT = "plain"
PATIENCE_SECONDS = 90.0
WORKERS = 3  # two may die in a row, and one is left

# How often a point is passed first, so that there is a checkpoint, and something beyond it, to lose.
_SKIPPED = {
    "resume.before_commit": 1,
    "child.step": 2 * SAVE_EVERY + 2,
    "report.before_commit": 2,
    "report.after_commit": 2,
    "checkpoint.after_write": 4,  # thrice in each checkpoint
    "checkpoint.after_fsync": 4,
    "checkpoint.after_rename": 4,
    "checkpoint.before_manifest": 1,
    "checkpoint.after_manifest": 1,
    "checkpoint.before_reference": 1,
    "checkpoint.after_reference": 1,
}


@dataclass(slots=True)
class Strike:
    """One point and how often it killed; times are seconds since the epoch."""

    point: str
    times: int
    hits: list[float] = field(default_factory=list)
    job_ids: list[str] = field(default_factory=list)  # the last one is whom the last kill met

    @property
    def reached(self) -> bool:
        return len(self.hits) == self.times

    def recovery(self, changes: Sequence[Change]) -> float | None:
        """Seconds from the last kill to the job's next step under a newer fence, or to its end.

        None where nothing was left to recover.
        """
        if not self.hits:
            return None
        killed = self.hits[-1]
        mine = [change for change in changes if change.job_id == self.job_ids[-1]]
        fence = max((change.fence for change in mine if change.at <= killed), default=0)
        after = [
            change.at - killed
            for change in mine
            if change.at > killed
            and (
                (change.kind == "steps" and change.fence > fence)
                or (change.kind == "state" and change.new in TERMINAL)
            )
        ]
        return min(after, default=None)


class Striker:
    """Brings processes to points at which they are killed."""

    def __init__(self, installation: Installation, campaign: Campaign) -> None:
        self._installation, self._campaign = installation, campaign

    def strike(self, point: str, times: int) -> Strike:
        """Run a job until `times` processes in a row were killed at `point`, and then to its end."""
        self._wait_for_workers(times + 1)
        before = len(self._hits(point))
        self._installation.arm(point, times=times, skip=_SKIPPED.get(point, 0))
        strike = Strike(point, times)
        self._submit(strike)
        lured, deadline = False, time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            strike.hits, seen = self._hits(point)[before:], len(strike.hits)
            if strike.reached:
                break
            if len(strike.hits) > seen and point == "drain.asked":  # the next worker must be told as well
                lured = False
            if self._job(strike).state.is_terminal:
                self._submit(strike)
                lured = False
            lured = lured or point not in _LURES or _LURES[point](self, strike)
            time.sleep(0.02)
        self._installation.disarm()
        self._campaign.wait(strike.job_ids, seconds=PATIENCE_SECONDS)
        return strike

    def kill_worker(self, strike: Strike) -> bool:
        """So that the job's lease runs out."""
        return self._signal_worker(strike, signal.SIGKILL)

    def drain_worker(self, strike: Strike) -> bool:
        return self._signal_worker(strike, signal.SIGTERM)

    def kill_child(self, strike: Strike) -> bool:
        """So that the job goes on from a checkpoint."""
        worker = self._trainer(strike)
        child = None if worker is None else self._installation.child(worker)
        if child is not None:
            os.kill(child, signal.SIGKILL)
        return child is not None

    def _signal_worker(self, strike: Strike, number: signal.Signals) -> bool:
        worker = self._trainer(strike)
        if worker is not None:
            self._installation.kill(worker, number)
        return worker is not None

    def _trainer(self, strike: Strike) -> str | None:
        """The worker that trains the job, once there is a checkpoint."""
        kept = self._installation.look(partial(jobs.checkpoints, job_id=strike.job_ids[-1]))
        for worker, (job_id, state, _) in self._installation.holders().items():
            if kept and job_id == strike.job_ids[-1] and state == "running":
                return worker
        return None

    def _submit(self, strike: Strike) -> None:
        if strike.point == "dispatch.after_send":
            # Workers look for jobs themselves: what is sent again is what waits while all of them are busy.
            strike.job_ids += [self._campaign.submit(VARIANT) for _ in range(2 * WORKERS)]
        strike.job_ids.append(self._campaign.submit(VARIANT))

    def _job(self, strike: Strike) -> jobs.Job:
        return self._installation.look(partial(jobs.get, job_id=strike.job_ids[-1], tenant=None))

    def _hits(self, point: str) -> list[float]:
        return [hit["at"] for hit in self._installation.hits() if hit["point"] == point]

    def _wait_for_workers(self, count: int) -> None:
        """So many are there, and wait for a job; what dies is started again by the installation."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        live = partial(workers.list_workers, live_seconds=LEASE_SECONDS)
        while True:
            pids = {self._installation.pid(name) for name in self._installation.workers}
            ready = [each for each in self._installation.look(live) if each.pid in pids and not each.busy]
            if len(ready) >= count:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(ready)} of {count} workers are ready")
            time.sleep(0.05)


# Points that a job does not pass by itself.
_LURES: dict[str, Callable[[Striker, Strike], bool]] = {
    "reap.before_commit": Striker.kill_worker,
    "resume.before_commit": Striker.kill_child,
    "resume.after_commit": Striker.kill_child,
    "drain.asked": Striker.drain_worker,
}


@dataclass(frozen=True, slots=True)
class Result:
    """What came of all strikes."""

    database: str
    seconds: float
    strikes: list[Strike]
    changes: Sequence[Change]
    violations: list[Violation]

    @property
    def good(self) -> bool:
        return not self.violations and all(strike.reached for strike in self.strikes)

    def summary(self) -> dict[str, Any]:
        return {
            "database": self.database,
            "seconds": round(self.seconds, 1),
            "points": {
                point: {
                    strike.times: {"kills": len(strike.hits), "recovery_seconds": self._recovery(strike)}
                    for strike in self.strikes
                    if strike.point == point
                }
                for point in dict.fromkeys(strike.point for strike in self.strikes)
            },
            "violations": [asdict(violation) for violation in self.violations],
        }

    def table(self) -> str:
        times = sorted({strike.times for strike in self.strikes})
        lines = [
            "| point | " + " | ".join(f"{n} in a row, s" if n > 1 else "once, s" for n in times) + " |",
            "|---" * (1 + len(times)) + "|",
        ]
        for point in dict.fromkeys(strike.point for strike in self.strikes):
            cells = [self._cell(strike) for strike in self.strikes if strike.point == point]
            lines.append(f"| `{point}` | {' | '.join(cells)} |")
        kills = sum(len(strike.hits) for strike in self.strikes)
        what = f"{len(self.strikes)} strikes, {kills} kills, {len(self.violations)} violations"
        lines += ["", f"{self.database}: {what} in {self.seconds:.0f} s"]
        lines += [f"  {v.invariant}: {self._whose(v)}: {v.what}" for v in self.violations]
        return "\n".join(lines)

    def _recovery(self, strike: Strike) -> float | None:
        seconds = strike.recovery(self.changes)
        return None if seconds is None else round(seconds, 2)

    def _cell(self, strike: Strike) -> str:
        if not strike.reached:
            return f"reached {len(strike.hits)} times"
        seconds = strike.recovery(self.changes)
        return "had ended" if seconds is None else f"{seconds:.1f}"

    def _whose(self, violation: Violation) -> str:
        struck = [f"{s.point} x {s.times}" for s in self.strikes if violation.job_id in s.job_ids]
        return f"{violation.job_id} ({', '.join(struck) or 'no point of its own'})"


def run(
    folder: Path, *, database: str, points: Sequence[str] = POINTS, times: Sequence[int] = (1, 2)
) -> Result:
    """Strike at each of `points`, each of `times` in a row; the installation is gone when it returns."""
    began = time.monotonic()
    installation = Installation(folder, database, WORKERS)
    try:
        installation.start()
        campaign = Campaign(installation, count=0, seed=0, patience=PATIENCE_SECONDS)
        campaign.take_references([VARIANT])
        striker = Striker(installation, campaign)
        strikes = []
        for point in points:
            for each in times:
                strikes.append(striker.strike(point, each))
                print(f"{point} x {each}: {len(strikes[-1].hits)} kills", flush=True)
        evidence = audit.gather(
            installation.database,
            installation.data_dir,
            history=campaign.client.history,
            references=campaign.references,
        )
        campaign.client.close()
        return Result(database, time.monotonic() - began, strikes, evidence.changes, check(evidence))
    finally:
        installation.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.points")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--only", action="append", choices=POINTS, help="only this point; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="halfstep-points-"))
    print(f"logs in {folder}", flush=True)
    # However it is ended, the servers and workers must be gone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    result = run(folder, database=arguments.database, points=arguments.only or POINTS)
    print(result.table())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result.summary(), indent=1) + "\n", encoding="utf-8")
    if result.good:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
