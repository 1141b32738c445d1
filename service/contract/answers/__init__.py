"""What is answered: one frozen model for each answer, by which it is built, described and read.

The API builds them, the OpenAPI document is made of them, and the client reads them. The order of a model's
fields is their order on the wire. No I/O and no database here.
"""

from halfstep.service.contract.answers.checkpoints import Checkpoint, CheckpointList
from halfstep.service.contract.answers.events import (
    Actor,
    Event,
    EventPage,
    StreamEnd,
    StreamMetrics,
    StreamState,
    TenantEvent,
    TenantEventPage,
)
from halfstep.service.contract.answers.fleet import (
    Capability,
    Component,
    ComponentList,
    Worker,
    WorkerList,
)
from halfstep.service.contract.answers.health import Alive, Part, Readiness
from halfstep.service.contract.answers.jobs import DryRun, Job, JobPage, Reason, Transition
from halfstep.service.contract.answers.problems import Problem, WrongPlace
from halfstep.service.contract.answers.progress import (
    LastOverflow,
    MetricsPage,
    PerformanceMetrics,
    Stats,
    StatsEvaluation,
    StatsPrecision,
    StepTime,
)
from halfstep.service.contract.answers.series import Series, SeriesList, SeriesPage
from halfstep.service.contract.answers.values import Answer

__all__ = [
    "Actor",
    "Alive",
    "Answer",
    "Capability",
    "Checkpoint",
    "CheckpointList",
    "Component",
    "ComponentList",
    "DryRun",
    "Event",
    "EventPage",
    "Job",
    "JobPage",
    "LastOverflow",
    "MetricsPage",
    "Part",
    "PerformanceMetrics",
    "Problem",
    "Readiness",
    "Reason",
    "Series",
    "SeriesList",
    "SeriesPage",
    "Stats",
    "StatsEvaluation",
    "StatsPrecision",
    "StepTime",
    "StreamEnd",
    "StreamMetrics",
    "StreamState",
    "TenantEvent",
    "TenantEventPage",
    "Transition",
    "Worker",
    "WorkerList",
    "WrongPlace",
]
