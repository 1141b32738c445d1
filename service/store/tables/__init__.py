"""The tables: columns, keys, checks and indexes, equal to what `migrations/` builds.

A comment stands where a constraint keeps an invariant. No statements here.
"""

from halfstep.service.store.tables.fleet import components, workers
from halfstep.service.store.tables.jobs import (
    checkpoints,
    deletions,
    idempotency_keys,
    job_events,
    job_stats,
    job_tags,
    job_transitions,
    jobs,
)
from halfstep.service.store.tables.outbox import outbox, outbox_cursors, outbox_waiting
from halfstep.service.store.tables.record import metric_chunks, metric_rollups, series_chunks
from halfstep.service.store.tables.tenants import api_keys
from halfstep.service.store.tables.types import ExactDouble, JsonText, metadata

__all__ = [
    "ExactDouble",
    "JsonText",
    "api_keys",
    "checkpoints",
    "components",
    "deletions",
    "idempotency_keys",
    "job_events",
    "job_stats",
    "job_tags",
    "job_transitions",
    "jobs",
    "metadata",
    "metric_chunks",
    "metric_rollups",
    "outbox",
    "outbox_cursors",
    "outbox_waiting",
    "series_chunks",
    "workers",
]
