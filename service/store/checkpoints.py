"""References to checkpoints; the files themselves are the worker's.

A reference is written under the fence, after the files are safe on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.store.clock import db_now
from service.store.records import lock_fenced
from service.store.tables import checkpoints as rows
from service.store.upsert import upsert


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of a job. `path`: its directory; `fence`: of the attempt that made it."""

    step: int
    fence: int
    path: str
    bytes: int
    sha256: str
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
            rows.c.metrics,
            rows.c.created_at,
        )
        .where(rows.c.job_id == job_id)
        .order_by(rows.c.step.desc())
    )
    return [Checkpoint(*row) for row in found]


def drop_checkpoint(s: Session, job_id: str, fence: int, step: int) -> None:
    """Forget the checkpoint of `step`, before its files are removed; nothing happens where there is none.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    lock_fenced(s, job_id, fence)
    s.execute(delete(rows).where(rows.c.job_id == job_id, rows.c.step == step))
