"""What a job's process does: warm up, then train as one order says and tell how it ended.

The composition root on torch's side. Pipes and signals are `child`'s.
"""

import contextlib
import importlib.metadata
import platform
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.speed import DtypeSpeed
from halfstep.service.contract.states import ReasonCode
from halfstep.service.errors import StaleFence, StoreUnavailable
from halfstep.service.faultpoints import reach
from halfstep.service.files.storage import mirror
from halfstep.service.settings import Settings
from halfstep.service.store import events
from halfstep.service.store.sql.database import Database, connect
from halfstep.worker.job.reporting import FIRST_FENCE, Reporter
from halfstep.worker.protocol import Done, Ready, RunOrder
from halfstep.worker.training import components
from halfstep.worker.training.checkpoints.writing import CheckpointRef
from halfstep.worker.training.device.capability import probe as probe_device
from halfstep.worker.training.device.warmup import take_a_step
from halfstep.worker.training.errors import TrainingFailure
from halfstep.worker.training.failures import out_of_memory
from halfstep.worker.training.loop import RunConfig, StopRequest, train

MAX_DECISIONS = 10_000  # a run changes its precision a few times at most; each resume tells them again

Asked = Callable[[], Literal["cancel", "pause", "drain"] | None]


def _connected(settings: Settings) -> Database:
    """The database, for what the worker does."""
    return connect(settings).acting(Actor(ActorKind.WORKER, name=settings.shown_worker_name))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a waiting process has ready.

    Attributes:
        ready: what the worker is told.
        settings: its own.
        database: with a connection open, where the database answered.
    """

    ready: Ready
    settings: Settings
    database: Database


def prepare(*, probe: bool) -> Prepared:
    """Load the components, take a first step and connect, so that an order is obeyed at once.

    Args:
        probe: Also tell what components there are and what the device can do.
    """
    settings = Settings()
    components.load_entry_points()
    components.load_modules(settings.component_modules)
    take_a_step()
    mirror(settings)  # its library is loaded before an order comes
    database = _connected(settings)
    with contextlib.suppress(StoreUnavailable):  # the job will wait for it, should it still be away then
        database.ping()
    return Prepared(_ready(settings, probe=probe), settings, database)


def run(prepared: Prepared, order: RunOrder, asked: Asked, on_progress: Callable[[int, float], None]) -> Done:
    """Train until the job is done, asked to stop, or cannot go on; the record is stored when this returns.

    Args:
        prepared: What this process has ready.
        order: The job.
        asked: What the job was asked to do, looked at between steps.
        on_progress: Called with the newest step and a step's usual seconds.
    """
    settings, database = prepared.settings, prepared.database
    if settings.model_dump(mode="json") != order.settings:  # a file that they are read from has changed since
        database.dispose()
        settings = Settings.model_validate(order.settings)
        database = _connected(settings)
    spec = JobSpec.stored(order.spec)
    # Records name files by their place below the data directory, so that a restored copy of both is whole.
    root = settings.data_dir
    remote = mirror(settings)
    reporter = Reporter(
        database,
        order.job_id,
        order.fence,
        on_progress=on_progress,
        path_of=lambda place: place.relative_to(root).as_posix(),
        mirror=remote,
    )
    told: list[events.Event] = []
    if order.fence > FIRST_FENCE or order.checkpoints:
        with database.read() as session:
            told = events.read(session, order.job_id, type="precision", limit=MAX_DECISIONS)
    config = RunConfig(
        spec=spec,
        device=order.device,
        directory=settings.job_directory(order.job_id),
        fence=order.fence,
        text_roots=settings.text_roots,
        resume=[CheckpointRef(**(known | {"path": root / known["path"]})) for known in order.checkpoints],
        decisions=[event.data for event in told if event.data is not None],
        elapsed_seconds=order.elapsed_seconds,
        speeds={dtype: DtypeSpeed.model_validate(speed) for dtype, speed in order.speeds.items()},
        mirror=remote,
    )
    reach("child.ordered")
    try:
        return _train(config, reporter, asked)
    except StaleFence as error:
        print(f"stopped: {error}", file=sys.stderr)
        return Done(outcome="stale", step=0)
    finally:
        database.dispose()


def _train(config: RunConfig, reporter: Reporter, asked: Asked) -> Done:
    def should_stop() -> StopRequest | None:
        request = asked()
        return None if request is None else StopRequest(request)

    try:
        outcome = train(config, reporter, should_stop)
    except StaleFence:
        raise
    except TrainingFailure as failure:
        traceback.print_exc()
        reporter.close()
        reason = {"code": str(failure.code), "message": failure.message, "detail": failure.detail}
        return Done(outcome="failed", step=0, reason=reason)
    except Exception as error:  # noqa: BLE001 - told to the client as the job's reason, with the traceback in its log
        traceback.print_exc()
        reporter.close()
        return Done(outcome="failed", step=0, reason=_unexpected(config.spec, error))
    # Nothing is terminal before its whole record is stored.
    reporter.close()
    reach("child.before_done")
    if outcome.stopped is None:
        return Done(outcome="finished", step=outcome.step)
    match outcome.stopped:
        case StopRequest.CANCEL:
            return Done(outcome="cancel", step=outcome.step)
        case StopRequest.PAUSE:
            return Done(outcome="pause", step=outcome.step)
        case StopRequest.DRAIN:
            return Done(outcome="drain", step=outcome.step)
    return Done(outcome="failed", step=outcome.step, reason=_time_limit(config, outcome.step))


def _unexpected(spec: JobSpec, error: Exception) -> dict[str, Any]:
    short = out_of_memory(spec, "the job", error)
    if short is not None:
        return {"code": str(short.code), "message": short.message, "detail": short.detail}
    return {
        "code": ReasonCode.COMPONENT_ERROR.value,
        "message": f"The job's code raised {type(error).__name__}; its traceback is in the detail. "
        "Correct the component that it names, then retry the job; if it names none, the worker has a defect.",
        "detail": traceback.format_exc()[-8000:],
    }


def _time_limit(config: RunConfig, step: int) -> dict[str, Any]:
    limit = config.spec.training.time_limit_seconds
    message = (
        f"The time limit of {limit} s was reached at step {step}, where the job stopped with a checkpoint. "
        "Retry it from there, which begins the time anew, or submit it with a larger "
        "training.time_limit_seconds."
    )
    return {"code": ReasonCode.TIME_LIMIT.value, "message": message, "detail": None}


def _ready(settings: Settings, *, probe: bool) -> Ready:
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "halfstep"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = probe_device(settings.data_dir) if probe else None
    catalogue = [component.as_dict() for component in components.catalogue()] if probe else []
    return Ready(capability=found, components=catalogue, versions=versions)
