"""The job's own process: waits with torch imported, takes one order, trains, reports, exits.

It dies with its parent: the kernel kills it when the thread that created it ends, and end of file on the
order pipe ends it too. Its standard output is the job's log, never a message.
"""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from service.contract.spec import JobSpec
from service.contract.states import ReasonCode
from service.errors import StaleFence
from service.settings import Settings
from service.store.database import Database
from worker.protocol import Done, Message, Progress, Ready, RunOrder, StopOrder, decode, encode
from worker.reporting import Reporter
from worker.training import components
from worker.training.capability import probe as probe_device
from worker.training.checkpoint import CheckpointRef
from worker.training.errors import TrainingFailure
from worker.training.loop import RunConfig, StopRequest, train
from worker.training.warmup import take_a_step

PR_SET_PDEATHSIG = 1
PROGRESS_SECONDS = 0.2
ORPHANED = 75


class _Control:
    """The order pipe's reader: the run order once, then stop requests; end of file ends the process."""

    def __init__(self, orders: IO[bytes]) -> None:
        self._orders = orders
        self._order: RunOrder | None = None
        self._stop: StopRequest | None = None
        self._ordered = threading.Event()
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def wait(self) -> RunOrder:
        self._ordered.wait()
        if self._order is None:
            raise RuntimeError("no order arrived")
        return self._order

    def should_stop(self) -> StopRequest | None:
        return self._stop

    def _read(self) -> None:
        for line in self._orders:
            message = decode(line)
            if isinstance(message, RunOrder):
                self._order = message
                self._ordered.set()
            elif isinstance(message, StopOrder):
                self._stop = StopRequest(message.why)
        # The parent is gone or no longer wants this process: whatever it wrote from here on would be refused.
        os._exit(ORPHANED)


class _Reports:
    """The report pipe, written by the training thread and the reporter alike."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()
        self._last_progress = 0.0

    def send(self, message: Message) -> None:
        with self._lock:
            self._file.write(encode(message))

    def progress(self, step: int, step_seconds: float) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self.send(Progress(step=step, step_seconds=step_seconds))


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def _ready(*, probe: bool) -> Ready:
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "halfstep"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = probe_device() if probe else None
    catalogue = [component.as_dict() for component in components.catalogue()] if probe else []
    return Ready(capability=found, components=catalogue, versions=versions)


def _run(order: RunOrder, control: _Control, reports: _Reports) -> Done:
    settings = Settings.model_validate(order.settings)
    spec = JobSpec.model_validate(order.spec)
    database = Database(settings.sql_url)
    reporter = Reporter(database, order.job_id, order.fence, on_progress=reports.progress)
    run = RunConfig(
        spec=spec,
        device=order.device,
        directory=settings.data_dir / "jobs" / order.job_id,
        fence=order.fence,
        text_roots=settings.text_roots,
        resume=[
            CheckpointRef(step=c["step"], path=Path(c["path"]), sha256=c["sha256"]) for c in order.checkpoints
        ],
        elapsed_seconds=order.elapsed_seconds,
    )
    try:
        return _train(run, reporter, control)
    except StaleFence as error:
        print(f"stopped: {error}", file=sys.stderr)
        return Done(outcome="stale", step=0)
    finally:
        database.dispose()


def _train(run: RunConfig, reporter: Reporter, control: _Control) -> Done:
    try:
        outcome = train(run, reporter, control.should_stop)
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
        reason = {
            "code": ReasonCode.COMPONENT_ERROR.value,
            "message": f"The job's code raised {type(error).__name__}; its traceback is in the detail.",
            "detail": traceback.format_exc()[-8000:],
        }
        return Done(outcome="failed", step=0, reason=reason)
    # Nothing is terminal before its whole record is stored.
    reporter.close()
    if outcome.stopped is None:
        return Done(outcome="finished", step=outcome.step)
    match outcome.stopped:
        case StopRequest.CANCEL:
            return Done(outcome="cancel", step=outcome.step)
        case StopRequest.PAUSE:
            return Done(outcome="pause", step=outcome.step)
        case StopRequest.DRAIN:
            return Done(outcome="drain", step=outcome.step)
    return Done(outcome="failed", step=outcome.step, reason=_time_limit(run, outcome.step))


def _time_limit(run: RunConfig, step: int) -> dict[str, Any]:
    limit = run.spec.training.time_limit_seconds
    message = f"The time limit of {limit} s was reached at step {step}; raise training.time_limit_seconds."
    return {"code": ReasonCode.TIME_LIMIT.value, "message": message, "detail": None}


def main() -> None:
    """Entry point of `python -m worker.child`; started by the worker, not by hand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--probe", action="store_true")
    arguments = parser.parse_args()
    _die_with_parent(arguments.parent)
    # A model that reads standard input must find it empty, not eat our orders.
    orders = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted, not a path
        os.dup2(nothing.fileno(), 0)
    control, reports = _Control(orders), _Reports(arguments.report_fd)
    components.load_entry_points()
    components.load_modules(Settings().component_modules)
    take_a_step()
    reports.send(_ready(probe=arguments.probe))
    reports.send(_run(control.wait(), control, reports))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries may still hold the interpreter; all that matters is written.
    os._exit(0)


if __name__ == "__main__":
    main()
