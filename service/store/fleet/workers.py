"""Workers: what each offers, how busy it is, when it was last seen, and who could run a given job.

Which job a worker gets is decided in `leases`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Double, and_, bindparam, delete, or_, select, update
from sqlalchemy.orm import Session

from halfstep.service.errors import NotFound
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.upsert import upsert
from halfstep.service.store.tables import workers

_FORGET_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Capability:
    """What a worker's device can do. `fp16` and `bf16`: natively."""

    device_type: Literal["cpu", "cuda"]
    bf16: bool
    fp16: bool
    memory_bytes: int
    device_name: str
    device_count: int


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a job needs of a worker."""

    device: Literal["auto", "cpu", "cuda"]
    needs_bf16: bool
    min_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process. Times are seconds since the epoch by the database's clock.

    `speed` is its device's by data type, as the fields of `DtypeSpeed`; None: not measured.
    """

    id: str
    name: str
    pid: int
    capability: Capability
    versions: dict[str, Any]
    slots: int
    busy: int
    draining: bool
    started_at: float
    last_seen: float
    speed: dict[str, Any] | None = None


def register(
    s: Session,
    *,
    worker_id: str,
    name: str,
    pid: int,
    capability: Capability,
    versions: Mapping[str, Any],
    slots: int,
    speed: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Announce a worker, or announce it again with what it offers now."""
    values = {
        "name": name,
        "pid": pid,
        "device_type": capability.device_type,
        "bf16": capability.bf16,
        "fp16": capability.fp16,
        "memory_bytes": capability.memory_bytes,
        "device_name": capability.device_name,
        "device_count": capability.device_count,
        "versions": dict(versions),
        "speed": None if speed is None else {dtype: dict(figures) for dtype, figures in speed.items()},
        "slots": slots,
        "busy": 0,
        "draining": False,
        "started_at": db_now(),
        "last_seen": db_now(),
        "stopped_at": None,
    }
    s.execute(delete(workers).where(workers.c.last_seen < db_now() - _FORGET_SECONDS))
    s.execute(upsert(s, workers, [{"id": worker_id, **values}]))


def beat(s: Session, worker_id: str, *, busy: int, draining: bool) -> None:
    """Say that the worker lives.

    Raises:
        NotFound: it is not registered (any more); register it again.
    """
    row = s.execute(
        update(workers)
        .where(workers.c.id == worker_id)
        .values(busy=busy, draining=draining, last_seen=db_now(), stopped_at=None)
        .returning(workers.c.id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"worker {worker_id} is not registered")


def remove(s: Session, worker_id: str) -> None:
    """Take a stopping worker out of the list. Its row stays a while, to tell who was there lately."""
    s.execute(update(workers).where(workers.c.id == worker_id).values(stopped_at=db_now(), busy=0))


def list_workers(s: Session, *, live_seconds: float) -> list[Worker]:
    """The workers seen within `live_seconds`, by name."""
    rows = s.execute(_LIVE_WORKERS, {"live_seconds": live_seconds})
    return [
        Worker(
            id=row.id,
            name=row.name,
            pid=row.pid,
            capability=Capability(
                row.device_type, row.bf16, row.fp16, row.memory_bytes, row.device_name, row.device_count
            ),
            versions=row.versions,
            slots=row.slots,
            busy=row.busy,
            draining=row.draining,
            started_at=row.started_at,
            last_seen=row.last_seen,
            speed=row.speed,
        )
        for row in rows
    ]


def count_capable(live: Iterable[Worker], needs: Requirements) -> int:
    """How many of these workers, draining ones aside, could run a job with these requirements."""
    return sum(not worker.draining and _can_run(needs, worker.capability) for worker in live)


def _can_run(needs: Requirements, able: Capability) -> bool:
    # As `can_run` below, of a worker that is at hand.
    return (
        needs.device in {"auto", able.device_type}
        and (able.bf16 or not needs.needs_bf16)
        and needs.min_memory_bytes <= able.memory_bytes
    )


def can_run(
    device: ColumnElement[str],
    needs_bf16: ColumnElement[bool],
    min_memory_bytes: ColumnElement[int],
    *,
    device_type: ColumnElement[str],
    bf16: ColumnElement[bool],
    memory_bytes: ColumnElement[int],
) -> ColumnElement[bool]:
    """The rule of who can run what, as SQL, with jobs or workers on either side."""
    return and_(
        or_(device == "auto", device == device_type),
        or_(needs_bf16.is_(False), bf16.is_(True)),
        min_memory_bytes <= memory_bytes,
    )


# Composed once: with every visit of submissions that costs more than to run it.
_LIVE_WORKERS = (
    select(workers)
    .where(
        workers.c.stopped_at.is_(None),
        workers.c.last_seen >= db_now() - bindparam("live_seconds", type_=Double),
    )
    .order_by(workers.c.name, workers.c.id)
)
