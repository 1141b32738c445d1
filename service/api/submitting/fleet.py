"""A valid JobSpec against what the fleet is now: components, precision on its devices, who could run it.

Reads the store; writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from halfstep.service.api.requests.pointers import pointer
from halfstep.service.api.submitting.components import Catalogue, check_components, with_defaults
from halfstep.service.contract.precision import DeviceCapability, UnsupportedPrecisionError, resolve
from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.speed import DtypeSpeed, Speeds, slow_precision
from halfstep.service.errors import FieldProblem, InvalidRequest
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.fleet import components, workers
from halfstep.service.store.fleet.workers import Capability

NO_CATALOGUE = (
    "no worker has published its components yet: names and parameters are unchecked, and a wrong one fails "
    "the job when it starts"
)


@dataclass(frozen=True, slots=True)
class Submission:
    """A spec ready to be stored.

    Attributes:
        spec: with its defaults filled in.
        warnings: what its author should know, a sentence each.
        capable_workers: live workers that could run it.
    """

    spec: JobSpec
    warnings: tuple[str, ...]
    capable_workers: int


class Catalogues:
    """The published catalogue, read again only when something was published."""

    def __init__(self) -> None:
        self._held: tuple[tuple[Any, ...], Catalogue] | None = None

    def current(self, session: Session) -> Catalogue:
        """The catalogue as `session` sees it."""
        edition = components.edition(session)
        held = self._held
        if held is None or held[0] != edition:
            # One statement after the other: it may be newer than its edition, and then is read once more.
            held = self._held = edition, components.catalogue(session)
        return held[1]


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device in the fleet; the speeds of each worker that has one and measured it."""

    capability: Capability
    speeds: tuple[Speeds, ...]


class Fleet:
    """What workers offer, as one transaction sees it; each thing is asked for once, however many specs."""

    def __init__(self, session: Session, settings: Settings, catalogues: Catalogues) -> None:
        self.catalogue = catalogues.current(session)
        self.live = workers.list_workers(session, live_seconds=settings.live_seconds)
        self.no_worker_seconds = settings.no_worker_seconds
        self._devices: dict[str, list[Device]] = {}

    def devices(self, wanted: str) -> list[Device]:
        """The distinct devices of the live workers that a spec's `resources.device` admits."""
        if wanted not in self._devices:
            found: dict[Capability, list[Speeds]] = {}
            for worker in self.live:
                if wanted in {"auto", worker.capability.device_type}:
                    speeds = found.setdefault(worker.capability, [])
                    if worker.speed is not None:
                        speeds.append({name: DtypeSpeed(**figures) for name, figures in worker.speed.items()})
            self._devices[wanted] = [Device(able, tuple(speeds)) for able, speeds in found.items()]
        return self._devices[wanted]


def prepare(spec: JobSpec, fleet: Fleet) -> Submission:
    """Check `spec` against the fleet and fill in its defaults.

    Raises:
        InvalidRequest: an unknown component, a wrong parameter, or a precision that no device here has.
    """
    catalogue = fleet.catalogue
    problems = check_components(spec, catalogue) if catalogue else []
    fitting = fleet.devices(spec.resources.device)
    model = catalogue.get(("model", spec.model.name))
    convolutional = model is not None and bool(model.extra.get("convolutional"))
    precision_problems, warnings = _check_precision(spec, fitting, convolutional=convolutional)
    problems += precision_problems
    if problems:
        raise InvalidRequest("The job's specification is not valid.", problems)
    if not catalogue:
        warnings.append(NO_CATALOGUE)
    capable = workers.count_capable(fleet.live, jobs.requirements(spec))
    if capable == 0:
        warnings.append(
            "no live worker can run this job now; it waits, and fails after "
            f"{fleet.no_worker_seconds:g} s without one"
        )
    return Submission(with_defaults(spec, catalogue), tuple(warnings), capable)


def _check_precision(
    spec: JobSpec, devices: Sequence[Device], *, convolutional: bool
) -> tuple[list[FieldProblem], list[str]]:
    """What the precision means on each device: problems where no device can, warnings otherwise."""
    problems: list[FieldProblem] = []
    warnings: dict[str, None] = {}
    for device in devices:
        able = device.capability
        name = able.device_name or able.device_type
        place = f" (on {name})" if len(devices) > 1 else ""
        capability = DeviceCapability(
            device_type=able.device_type, bf16=able.bf16, fp16=able.fp16, name=able.device_name
        )
        try:
            resolved = resolve(spec.precision, capability)
        except UnsupportedPrecisionError as error:
            problems.append(FieldProblem(pointer("precision", error.field), error.reason))
            warnings[f"{error.field}: {error.reason}{place}"] = None
        else:
            warnings.update(dict.fromkeys(f"{warning}{place}" for warning in resolved.warnings))
            slow = [
                found
                for speeds in device.speeds
                if (
                    found := slow_precision(
                        spec.precision, resolved.low_dtype, speeds, convolutional=convolutional
                    )
                )
            ]
            if slow:
                # Workers with the same device measured it each for itself; the slowest one is told.
                warnings[min(slow, key=lambda found: found.relative).sentence(name)] = None
    if devices and len(problems) == len(devices):
        return list(dict.fromkeys(problems)), []
    return [], list(warnings)
