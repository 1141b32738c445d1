"""What the database itself saw: triggers that note every change of a job, and all of it read as evidence.

The triggers belong to the suite, not to the product's schema; they see what a wrong statement really wrote.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session

from halfstep.service.contract.metrics import METRIC_COLUMNS
from halfstep.service.store import jobs, record
from halfstep.service.store.sql.database import Database
from halfstep.worker.training.checkpoints import reading
from halfstep.worker.training.checkpoints.writing import CheckpointRef
from halfstep.worker.training.errors import CheckpointDamaged
from tests.faults.checker import Change, Evidence, Reference, Request, Saved, Seen

_COLUMNS = "at, job_id, kind, old, new, old_fence, fence, writer, lease_until"
_TYPES = (
    "at double precision, job_id text, kind text, old text, new text, old_fence bigint, fence bigint, "
    "writer bigint, lease_until double precision"
)
_VALUES = {
    "state": "{now}, NEW.id, 'state', OLD.state, NEW.state, OLD.fence, NEW.fence, NULL, OLD.lease_until",
    "steps": "{now}, NEW.job_id, CASE WHEN NEW.current_step > OLD.current_step THEN 'steps' ELSE 'cut' END, "
    "CAST(OLD.current_step AS TEXT), CAST(NEW.current_step AS TEXT), "
    "(SELECT fence FROM jobs WHERE id = NEW.job_id), (SELECT fence FROM jobs WHERE id = NEW.job_id), "
    "NEW.batch_fence, NULL",
    "checkpoint": "{now}, NEW.job_id, 'checkpoint', NULL, CAST(NEW.step AS TEXT), "
    "(SELECT fence FROM jobs WHERE id = NEW.job_id), (SELECT fence FROM jobs WHERE id = NEW.job_id), "
    "NEW.fence, NULL",
}
_WHEN = {
    "state": ("UPDATE", "jobs", "OLD.state <> NEW.state OR OLD.fence <> NEW.fence"),
    "steps": ("UPDATE", "job_stats", "OLD.current_step <> NEW.current_step"),
    "checkpoint": ("INSERT", "checkpoints", "1 = 1"),
}
_NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "EXTRACT(EPOCH FROM clock_timestamp())::double precision",
}


def install(database: Database) -> None:
    """Add the table and its triggers to a migrated database."""
    number = "bigserial" if database.dialect == "postgresql" else "integer"
    statements = [f"CREATE TABLE fault_audit (seq {number} PRIMARY KEY, {_TYPES})"]
    for kind, values in _VALUES.items():
        insert = f"INSERT INTO fault_audit ({_COLUMNS}) VALUES ({values.format(now=_NOW[database.dialect])});"
        event, table, condition = _WHEN[kind]
        head = f"CREATE TRIGGER fault_audit_{kind} AFTER {event} ON {table} FOR EACH ROW WHEN ({condition})"
        if database.dialect == "postgresql":
            body = f"BEGIN {insert} RETURN NULL; END"
            statements.append(
                f"CREATE FUNCTION fault_audit_{kind}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$"
            )
            statements.append(f"{head} EXECUTE FUNCTION fault_audit_{kind}()")
        else:
            statements.append(f"{head} BEGIN {insert} END")
    with database.begin() as s:
        for statement in statements:
            s.connection().exec_driver_sql(statement.replace("%", "%%"))


def changes(s: Session) -> list[Change]:
    """Everything the triggers noted, in order."""
    found = s.execute(text(f"SELECT {_COLUMNS} FROM fault_audit ORDER BY seq"))
    return [
        Change(
            row.at,
            row.job_id,
            row.kind,
            row.old if row.kind == "state" else int(row.old or 0),
            row.new if row.kind == "state" else int(row.new),
            row.old_fence,
            row.fence,
            row.writer,
            row.lease_until,
        )
        for row in found
    ]


def seen(s: Session, job_id: str, data_dir: Path) -> Seen:
    """One job as it is stored, its checkpoints tried."""
    job = jobs.get(s, job_id, tenant=None)
    return Seen(
        state=str(job.state),
        fence=job.fence,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        code=None if job.status_reason is None else job.status_reason["code"],
        variant=job.tags.get("variant", ""),
        states=[(str(step.state), step.at, step.reason) for step in jobs.transitions(s, job_id)],
        columns=record.read(s, job_id, limit=1_000_000, fields=list(METRIC_COLUMNS)).columns,
        checkpoints=[
            Saved(kept.step, kept.fence, kept.sha256, _loads(kept, data_dir))
            for kept in jobs.checkpoints(s, job_id)
        ],
    )


def reference(found: Seen) -> Reference:
    """What an undisturbed run of a variant makes of all others."""
    newest = found.checkpoints[0].sha256 if found.checkpoints else None
    return Reference(found.state, found.code, found.columns, newest)


def gather(
    database: Database,
    data_dir: Path,
    *,
    history: Sequence[Request],
    references: Mapping[str, Reference],
) -> Evidence:
    """All evidence of a run, after its last job has ended or its time is over."""
    with database.read() as s:
        ids = [row.id for row in s.execute(text("SELECT id FROM jobs ORDER BY id"))]
        keys = [(row.key, row.job_id) for row in s.execute(text("SELECT key, job_id FROM idempotency_keys"))]
        return Evidence(
            history=history,
            jobs={job_id: seen(s, job_id, data_dir) for job_id in ids},
            keys=keys,
            changes=changes(s),
            references=references,
        )


def _loads(kept: jobs.Checkpoint, data_dir: Path) -> bool:
    try:
        reading.load(
            CheckpointRef(
                step=kept.step,
                path=data_dir / kept.path,
                sha256=kept.sha256,
                manifest_sha256=kept.manifest_sha256,
            )
        )
    except CheckpointDamaged:
        return False
    return True
