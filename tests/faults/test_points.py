"""The list of fault points is the product's, each kind of fault can be drawn and injected.

The database's own notes see what the checker needs.
"""

import random
import re
from pathlib import Path

from service.store import jobs, metrics
from service.store.database import Database
from service.store.schema import migrate
from tests.e2e.cluster import ROOT
from tests.faults import audit
from tests.faults.injections import Injector
from tests.faults.kinds import DRAIN, KILLS, KINDS, ONCE, POINTS, schedule
from tests.store.making import LIVE, claimed, steps, submitted


def test_every_point_of_the_product_is_listed_and_no_other() -> None:
    found = [
        name
        for room in ("service", "worker")
        for file in (ROOT / room).rglob("*.py")
        for name in re.findall(r'\breach\("([a-z_.]+)"\)', file.read_text(encoding="utf-8"))
    ]
    assert sorted(found) == sorted(POINTS)


def test_every_kind_of_fault_can_be_injected_and_half_of_a_run_are_kills() -> None:
    assert [kind for kind in KINDS if not callable(getattr(Injector, kind.replace(" ", "_"), None))] == []
    assert {*KILLS, DRAIN, *ONCE} <= set(KINDS)
    drawn = schedule(70, "postgresql", random.Random(1))
    assert len(drawn) == 70
    assert set(drawn) == set(KINDS)
    assert sum(kind in KILLS for kind in drawn) >= 30
    assert not [kind for kind in schedule(70, "sqlite", random.Random(1)) if kind.startswith("postgres")]


def test_the_triggers_note_states_steps_and_checkpoints(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'halfstep.db'}"
    migrate(url)
    database = Database(url)
    audit.install(database)
    job = submitted(database)
    held = claimed(database)
    with database.begin() as s:
        jobs.mark_running(s, job.id, held.fence)
        metrics.append(s, job.id, held.fence, steps(1, 4), LIVE)
        metrics.truncate_after(s, job.id, held.fence, 2)
        jobs.record_checkpoint(
            s, job.id, held.fence, step=2, path="x", bytes=1, sha256="0" * 64, metrics=None
        )
    with database.read() as s:
        noted = [(c.kind, c.old, c.new, c.old_fence, c.fence, c.writer) for c in audit.changes(s)]
    database.dispose()
    assert noted == [
        ("state", "queued", "starting", 0, 1, None),
        ("state", "starting", "running", 1, 1, None),
        ("steps", 0, 4, 1, 1, 1),
        ("cut", 4, 2, 1, 1, None),
        ("checkpoint", 0, 2, 1, 1, 1),
    ]
