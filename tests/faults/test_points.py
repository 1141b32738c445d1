"""The list of fault points is the product's, each kind of fault can be drawn and injected.

The database's own notes see what the checker needs.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from halfstep.service.store import jobs, record
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from tests.e2e.cluster import ROOT
from tests.faults import audit
from tests.faults.checker import Change
from tests.faults.injections import Fault, Injector
from tests.faults.kinds import DRAIN, KILLS, KINDS, ONCE, POINTS, schedule
from tests.faults.points import Strike
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


def moved(at: float, old: str, new: str, fence: int) -> Change:
    return Change(at, "a", "state", old, new, fence - (new == "starting"), fence)


def taken(at: float, fence: int) -> Change:
    return Change(at, "a", "steps", 0, 5, fence, fence, writer=fence)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ([moved(9.0, "queued", "starting", 1), taken(10.5, 1), taken(13.0, 2)], 3.0),
        ([moved(9.0, "queued", "starting", 1), moved(12.0, "cancelling", "cancelled", 1)], 2.0),
        ([moved(11.0, "queued", "starting", 1), taken(12.5, 1)], 2.5),  # nobody held it yet
        ([moved(9.0, "queued", "starting", 1), moved(9.5, "running", "succeeded", 1)], None),
    ],
    ids=["not by what the old attempt still wrote", "by its end", "by its first step", "nothing was left"],
)
def test_a_job_has_recovered_once_a_newer_attempt_takes_a_step(
    changes: list[Change], seconds: float | None
) -> None:
    assert Strike("child.step", 1, hits=[10.0], job_ids=["a"]).recovery(changes) == seconds


class Armed:
    """All of an installation that is asked when a run is over."""

    def hits(self) -> list[dict[str, object]]:
        return [{"point": "child.step", "at": 3.0}]


def judged(*faults: Fault, changes: Sequence[Change] = ()) -> list[bool]:
    injector = Injector(Armed(), None, random.Random(1))  # type: ignore[arg-type]  # all that is asked of them
    injector.faults += faults
    injector.judge(changes)
    return [fault.hit for fault in faults]


def test_a_fault_that_arms_a_point_has_hit_once_a_process_came_by() -> None:
    early, met, late = (Fault("crash point", at, point="child.step") for at in (1.0, 2.0, 4.0))
    other = Fault("disk full", 1.0, point="checkpoint.after_write")
    assert judged(early, met, late, other) == [False, True, False, False]


def test_a_kill_has_hit_where_the_job_went_back_to_the_queue_for_it() -> None:
    first = Fault("kill child", 2.0, hit=True, job_id="a", fence=1)
    second = Fault("kill child", 5.0, hit=True, job_id="a", fence=2)
    changes = [moved(2.5, "running", "queued", 1), moved(5.5, "running", "succeeded", 2)]
    assert judged(first, second, changes=changes) == [True, False]


def test_the_triggers_note_states_steps_and_checkpoints(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'halfstep.db'}"
    migrate(url)
    database = Database(url)
    audit.install(database)
    job = submitted(database)
    held = claimed(database)
    with database.begin() as s:
        jobs.mark_running(s, job.id, held.fence)
        record.append(s, job.id, held.fence, steps(1, 4), LIVE)
        record.truncate_after(s, job.id, held.fence, 2)
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
