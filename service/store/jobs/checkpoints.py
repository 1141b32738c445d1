"""References to checkpoints; the files themselves are the worker's.

A reference is written under the fence, after the files are safe on disk. A retry refers to the files of the
job that it goes on from: files may go when the last reference to them has gone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from halfstep.service.store.job_rows import lock_fenced
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.upsert import upsert
from halfstep.service.store.tables import checkpoints as rows


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of a job. `path`: its directory; `fence`: of the attempt that made it.

    `sha256` is that of the weights, `manifest_sha256` that of the file that has every file's.
    """

    step: int
    fence: int
    path: str
    bytes: int
    sha256: str
    manifest_sha256: str | None
    metrics: dict[str, Any] | None
    created_at: float


def record_checkpoint(
    s: Session,
    job_id: str,
    fence: int,
    *,
    step: int,
    path: str,
    bytes: int,  # noqa: A002  # the field's name on the wire
    sha256: str,
    metrics: Mapping[str, Any] | None,
    manifest_sha256: str | None = None,
) -> None:
    """Add a checkpoint; one of the same step from an earlier attempt is replaced.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    lock_fenced(s, job_id, fence)
    row = {
        "job_id": job_id,
        "step": step,
        "fence": fence,
        "path": path,
        "bytes": bytes,
        "sha256": sha256,
        "manifest_sha256": manifest_sha256,
        "metrics": None if metrics is None else dict(metrics),
        "created_at": db_now(),
    }
    s.execute(upsert(s, rows, [row]))


def checkpoints(s: Session, job_id: str) -> list[Checkpoint]:
    """The job's checkpoints, newest first."""
    found = s.execute(
        select(
            rows.c.step,
            rows.c.fence,
            rows.c.path,
            rows.c.bytes,
            rows.c.sha256,
            rows.c.manifest_sha256,
            rows.c.metrics,
            rows.c.created_at,
        )
        .where(rows.c.job_id == job_id)
        .order_by(rows.c.step.desc())
    )
    return [Checkpoint(*row) for row in found]


def adopt_checkpoint(s: Session, job_id: str, kept: Checkpoint) -> None:
    """Let a new job refer to a checkpoint of another, which the caller has locked."""
    s.execute(insert(rows).values(job_id=job_id, **asdict(kept)))


def drop_checkpoint(s: Session, job_id: str, fence: int, step: int) -> bool:
    """Forget the checkpoint of `step`, before its files are removed; nothing happens where there is none.

    Returns whether its files may go: no other job refers to them.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    lock_fenced(s, job_id, fence)
    removable, _ = drop_checkpoints(s, job_id, step=step)
    return bool(removable)


def drop_checkpoints(s: Session, job_id: str, *, step: int | None = None) -> tuple[list[str], list[str]]:
    """Forget the checkpoints of a job whose row the caller has locked, or the one of `step`.

    Returns the paths that nobody refers to any more, and those that other jobs still do.
    """
    mine = rows.c.job_id == job_id
    if step is not None:
        mine &= rows.c.step == step
    paths = set(s.scalars(select(rows.c.path).where(mine)))
    # Locked in one order: of two jobs that drop the same files at once, the second sees that the first did.
    named = s.execute(
        select(rows.c.job_id, rows.c.path)
        .where(rows.c.path.in_(sorted(paths)))
        .order_by(rows.c.path, rows.c.job_id)
        .with_for_update()
    ).all()
    s.execute(delete(rows).where(mine))
    shared = {path for owner, path in named if owner != job_id}
    return sorted(paths - shared), sorted(shared)
