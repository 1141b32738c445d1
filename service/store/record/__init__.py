"""The step record: steps in chunks, roll-ups for plots, totals, one summary row a job, reading and following.

Its functions are offered here, so that callers need one name; which file each is in is the room's own matter.
"""

from halfstep.service.store.record.plots import downsample
from halfstep.service.store.record.reading import MetricPage, read
from halfstep.service.store.record.summary import Stats, summaries, summarise, versions
from halfstep.service.store.record.writing import append, evaluated, inherit, opened, truncate_after

__all__ = [
    "MetricPage",
    "Stats",
    "append",
    "downsample",
    "evaluated",
    "inherit",
    "opened",
    "read",
    "summaries",
    "summarise",
    "truncate_after",
    "versions",
]
