"""`python -m tests.faults.outbox`: many writers of events, and a consumer that is killed.

Writers are processes that wait for a moment between a write and its commit, so that events commit in another
order than they were written in. Two processes work for one consumer, as two dispatchers do, and are killed
with SIGKILL again and again. What was delivered stands in one file that both append to.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from halfstep.service.contract.spec import JobSpec
from halfstep.service.dispatch.consuming import Consumer, consume
from halfstep.service.errors import StoreUnavailable
from halfstep.service.store import jobs, outbox
from halfstep.service.store.event_rows import NewEvent, write_events
from halfstep.service.store.outbox import Entry
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from halfstep.service.store.tables import job_stats
from tests.databases import empty_database

DELIVERED = "each event is delivered"
IN_ORDER = "the events of a job are delivered in order"
ARRIVED = "everything is delivered in the time it may take"
INVARIANTS = (DELIVERED, IN_ORDER, ARRIVED)

CONSUMER = "audit"
HELD_SECONDS = 0.4  # after a kill the other process waits for so long
PATIENCE = 120.0  # of a transaction's retries, and until a standstill is one: many share few cores
BYTES_A_DELIVERY = 45
_processes = get_context("forkserver")
_processes.set_forkserver_preload(
    ["halfstep.service.dispatch.consuming", "halfstep.service.store.jobs", "tests.databases"]
)


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant, with what showed it."""

    invariant: str
    detail: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did and found."""

    database: str
    events: int
    delivered: int  # repeats included
    kills: int
    late_commits: int  # transactions that were held open for longer than the others
    write_seconds: float
    seconds: float
    violations: tuple[Violation, ...]


def write(url: str, job_ids: Sequence[str], number: int, seed: int, late: str) -> None:
    """Be a writer: `number` events of jobs at random, a few in a transaction that commits after a delay."""
    chance = random.Random(seed)
    database = Database(url, pool_size=1)
    slow = 0
    while number:
        several = min(number, chance.randint(1, 16))
        # In one order everywhere, as all who lock more than one job do.
        chosen = sorted(Counter(chance.choices(chance.sample(job_ids, 3), k=several)).items())
        held = chance.random() < 0.04
        delay = chance.uniform(0.05, 0.25) if held else chance.expovariate(1 / 0.001)

        def tell(s: Session, chosen: Sequence[tuple[str, int]] = chosen, delay: float = delay) -> None:
            for job_id, of_it in chosen:
                _append(s, job_id, of_it)
            time.sleep(delay)

        database.retry(tell, seconds=PATIENCE)
        number -= several
        slow += held
    database.dispose()
    Path(late).write_text(str(slow), encoding="ascii")


def _append(s: Session, job_id: str, number: int) -> None:
    """As a change of states does: numbers are drawn under the job's lock, then one statement writes."""
    at, last = s.execute(
        update(job_stats)
        .where(job_stats.c.job_id == job_id)
        .values(last_event=job_stats.c.last_event + number, updated_at=db_now())
        .returning(job_stats.c.updated_at, job_stats.c.last_event)
    ).one()
    write_events(
        s,
        [
            NewEvent(job_id=job_id, seq=seq, at=at, type="alert", level="info", message="look")
            for seq in range(last - number + 1, last + 1)
        ],
    )


def deliver(url: str, log: str, seed: float, dies: float) -> None:
    """Be a dispatcher with one consumer, until killed: give positions, handle what is new, note it.

    With the probability `dies` it kills itself while it handles, before the note or after it: a kill from
    outside seldom meets that moment on a busy machine.
    """
    chance = random.Random(seed)
    database = Database(url, pool_size=1)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def handle(entries: Sequence[Entry]) -> None:
        time.sleep(chance.uniform(0, 0.04))
        if chance.random() < dies:
            os.kill(os.getpid(), signal.SIGKILL)
        lines = "".join(f"{each.position} {each.job_id} {each.seq}\n" for each in entries)
        os.write(file, lines.encode("ascii"))  # at once and at the end: processes do not mix
        if chance.random() < dies / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    consumer = Consumer(name=CONSUMER, handle=handle, batch=100, held_seconds=HELD_SECONDS)
    holder = uuid.uuid4().hex
    while True:
        try:
            with database.read() as s:
                waiting = outbox.any_waiting(s)
            if waiting:
                database.retry(outbox.sequence, seconds=PATIENCE)
            busy = consume(database, consumer, holder=holder)
        except StoreUnavailable:
            busy = False
        if not busy:
            time.sleep(0.01)


def found(expected: dict[str, int], lines: Sequence[str]) -> list[Violation]:
    """What the deliveries break; `expected` is how many events each job has."""
    first: dict[str, list[int]] = {job_id: [] for job_id in expected}
    seen: set[tuple[str, int]] = set()
    for line in lines:
        _, job_id, number = line.split()
        seq = int(number)
        if (job_id, seq) not in seen:
            seen.add((job_id, seq))
            first[job_id].append(seq)
    broken = []
    for job_id, last in expected.items():
        if missing := sorted(set(range(1, last + 1)).difference(first[job_id])):
            detail = f"{len(missing)} of {last} events of job {job_id}, the first is {missing[0]}"
            broken.append(Violation(DELIVERED, detail))
        if first[job_id] != sorted(first[job_id]):
            broken.append(Violation(IN_ORDER, f"job {job_id}"))
    return broken


def run(
    directory: Path, *, database: str, count: int, writers: int, seed: int, jobs_number: int = 24
) -> Result:
    """Write `count` events, kill consumers meanwhile, wait until all is delivered, and check it."""
    with empty_database(database, directory) as url:
        migrate(url)
        return _run(
            directory, url, database, count=count, writers=writers, seed=seed, jobs_number=jobs_number
        )


def _run(
    directory: Path, url: str, kind: str, *, count: int, writers: int, seed: int, jobs_number: int
) -> Result:
    chance = random.Random(seed)
    log = directory / "deliveries"
    log.touch()
    database = Database(url)
    spec = JobSpec.model_validate({"model": {"name": "mlp"}, "dataset": {"name": "digits"}})
    job_ids = [
        database.retry(lambda s: jobs.submit(s, tenant="acme", spec=spec))[0].id for _ in range(jobs_number)
    ]
    began = time.monotonic()
    shares = [count // writers + (index < count % writers) for index in range(writers)]
    late = [directory / f"late-{index}" for index in range(writers)]
    writing: list[BaseProcess] = [
        _started(write, url, job_ids, share, seed + index, str(late[index]))
        for index, share in enumerate(shares)
    ]
    dies = min(0.1, 1000 / count)
    consumers = [_started(deliver, url, str(log), chance.random(), dies) for _ in range(2)]
    # Between two kills so much is delivered, at random: a busy machine must not be killed to a standstill.
    most_between = max(600, count // 30) * BYTES_A_DELIVERY
    kills, written = 0, None
    size, next_kill, moved = 0, chance.uniform(0, most_between), began
    arrived = False
    try:
        while not arrived and time.monotonic() < moved + PATIENCE:
            time.sleep(chance.uniform(0, 0.03))
            if (grown := log.stat().st_size) > size:
                size, moved = grown, time.monotonic()
            if size >= next_kill:
                # Not always at the same place of a round, which the end of a delivery is.
                time.sleep(chance.uniform(0, 0.2))
                victim = chance.randrange(2)
                _kill(consumers[victim])
                kills += 1
                consumers[victim] = _started(deliver, url, str(log), chance.random(), dies)
                next_kill = size + chance.uniform(0, most_between)
            for index, process in enumerate(consumers):
                if not process.is_alive():
                    _kill(process)
                    kills += 1
                    consumers[index] = _started(deliver, url, str(log), chance.random(), dies)
            if written is None and not any(process.is_alive() for process in writing):
                written = time.monotonic() - began
            if written is not None:
                with database.read() as s:
                    newest = outbox.newest_position(s)
                    arrived = not outbox.any_waiting(s) and outbox.position_of(s, CONSUMER) >= newest
    finally:
        for process in (*writing, *consumers):
            _kill(process)
    seconds = time.monotonic() - began
    with database.read() as s:
        expected = {row.job_id: row.last_event for row in s.execute(select(job_stats))}
    database.dispose()
    # A process that was killed in the middle of a write may have left half a line: that was no delivery.
    lines = [line for line in log.read_text(encoding="ascii").split("\n")[:-1] if len(line.split()) == 3]
    violations = found(expected, lines)
    if not arrived:
        violations.append(Violation(ARRIVED, f"nothing came for {PATIENCE:.0f} s"))
    if sum(expected.values()) != count + jobs_number:
        violations.append(Violation(ARRIVED, f"{sum(expected.values())} events were written"))
    slow = sum(int(each.read_text(encoding="ascii")) for each in late if each.exists())
    return Result(
        database=kind,
        events=sum(expected.values()),
        delivered=len(lines),
        kills=kills,
        late_commits=slow,
        write_seconds=written or seconds,
        seconds=seconds,
        violations=tuple(violations),
    )


def _started(target: object, *arguments: object) -> BaseProcess:
    process = _processes.Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]  # callables
    process.start()
    return process


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.outbox")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halfstep-outbox-") as name:
        result = run(
            Path(name),
            database=arguments.database,
            count=arguments.events,
            writers=arguments.writers,
            seed=arguments.seed,
        )
    print(
        f"{result.database} | {result.events} events | {result.delivered} deliveries | "
        f"{result.kills} kills | {result.late_commits} late commits | "
        f"written in {result.write_seconds:.1f} s | all in {result.seconds:.1f} s | "
        f"{len(result.violations)} violations"
    )
    for violation in result.violations[:20]:
        print(f"  {violation.invariant}: {violation.detail}")
    if arguments.json:
        document = asdict(result) | {"violations": [asdict(each) for each in result.violations]}
        arguments.json.write_text(json.dumps(document), encoding="utf-8")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
