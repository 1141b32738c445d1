"""Every reason for which a job may end can come about, and says whose fault it is and what to try next."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import JobState, ReasonCode
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.sql.database import Database
from halfstep.worker.host.conclusions import conclusion, told
from halfstep.worker.host.supervision import Ending
from halfstep.worker.job import execution
from halfstep.worker.protocol import RunOrder
from halfstep.worker.training.components import InputKind, NoParameters, Task, register_model, registry
from tests.store.making import claimed, running, state_of, submitted
from tests.training.jobs import job as job_spec


class Broken(nn.Module):
    """Linear, and something that goes wrong in its second training step."""

    def __init__(self, fail: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.out = nn.Linear(16, 4)
        self.fail = fail
        self.steps = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.steps == 2:
            self.fail(self)
        return self.out(features)


@dataclass
class Place:
    """Where a reason comes about."""

    database: Database
    folder: Path

    def run(self, blocks: dict[str, Any], *, blocked: bool = False) -> dict[str, Any]:
        """The reason of a job that a worker's process runs to its failure."""
        spec = job_spec(**blocks)
        settings = Settings(
            data_dir=self.folder, database_url=self.database.url.render_as_string(hide_password=False)
        )
        held = self.claim(spec)
        if blocked:  # a file in the place of its directory: no checkpoint can be written
            settings.job_directory(held.id).parent.mkdir(parents=True)
            settings.job_directory(held.id).touch()
        prepared = execution.Prepared(execution.prepare(probe=False).ready, settings, self.database)
        order = RunOrder(
            job_id=held.id,
            fence=held.fence,
            attempt=1,
            spec=held.spec,
            settings=settings.model_dump(mode="json"),
            device="cpu",
            elapsed_seconds=0.0,
            checkpoints=[],
            speeds={},
        )
        done = execution.run(prepared, order, lambda: None, lambda _step, _seconds: None)
        assert done.outcome == "failed"
        return self.stored(held, told(held, done))

    def broken(self, fail: Callable[[nn.Module], None], **blocks: Any) -> dict[str, Any]:
        register_model(
            "broken",
            NoParameters,
            summary="Breaks.",
            inputs=(InputKind.FEATURES,),
            tasks=(Task.CLASSIFICATION,),
        )(lambda _parameters, _data: Broken(fail))
        return self.run({"model": {"name": "broken"}, **blocks})

    def claim(self, spec: JobSpec) -> jobs.Job:
        self.database.retry(lambda s: jobs.submit(s, tenant="acme", spec=spec))
        return claimed(self.database)

    def ended(self, **how: Any) -> dict[str, Any]:
        """The reason of a job whose process ended like this in its only attempt."""
        held = running(self.database, max_attempts=1)
        plain = {"done": None, "returncode": -9, "killed_for": None, "last_step": 7, "last_words": "the end"}
        memory = how.pop("host_memory_killed", False)
        write = conclusion(held, Ending(**(plain | how)), host_memory_killed=memory)
        assert write is not None
        return self.stored(held, write)

    def stored(self, held: jobs.Job, write: Callable[[Any], jobs.Job]) -> dict[str, Any]:
        after = self.database.retry(write)
        assert after.state in {JobState.FAILED, JobState.CANCELLED}
        with self.database.read() as s:
            found = jobs.get(s, held.id, tenant="acme")
        assert found.status_reason is not None
        return found.status_reason

    def unwanted(self) -> dict[str, Any]:
        held = submitted(self.database)
        with self.database.begin() as s:
            [failed] = jobs.fail_without_worker(s, seconds=0.0, live_seconds=0.0)
        assert failed.id == held.id
        return failed.status_reason or {}

    def lease_over(self) -> dict[str, Any]:
        submitted(self.database, max_attempts=1)
        held = claimed(self.database, lease_seconds=-1.0)
        with self.database.begin() as s:
            [failed] = jobs.reap(s)
        assert failed.id == held.id
        return failed.status_reason or {}

    def cancelled(self) -> dict[str, Any]:
        held = submitted(self.database)
        return self.stored(held, lambda s: jobs.request_cancel(s, held.id, tenant=None))


@pytest.fixture
def place(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path))
    registry.load_built_in()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    return Place(database, tmp_path)


def raising(error: Exception) -> Callable[[nn.Module], None]:
    def fail(_model: nn.Module) -> None:
        raise error

    return fail


def burst(model: nn.Module) -> None:
    """From here on its gradients are infinite, and its loss is not."""
    model.out.weight.register_hook(lambda gradient: gradient * torch.inf)


SYNTHETIC = {"samples": 160, "held_out_samples": 8}
BF16 = {"precision_level": "bf16", "max_consecutive_skips": 3, "nan_handling": False}
SMALLEST = {
    "precision_level": "fp16",
    "min_scale": 2.0**24,
    "initial_scale": 2.0**24,
    "max_consecutive_skips": 5,
}
CAUSES: dict[tuple[ReasonCode, str], tuple[Callable[[Place], dict[str, Any]], str, str]] = {
    (ReasonCode.OUT_OF_MEMORY_DEVICE, ""): (
        lambda p: p.broken(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))),
        "step 2 ran out of memory on the device",
        "Try batch_size 8 with gradient_accumulation_steps 2",
    ),
    (ReasonCode.OUT_OF_MEMORY_HOST, "python's"): (
        lambda p: p.broken(raising(MemoryError())),
        "step 2 ran out of memory on the host",
        "Try batch_size 8 with gradient_accumulation_steps 2",
    ),
    (ReasonCode.OUT_OF_MEMORY_HOST, "torch's"): (
        lambda p: p.broken(lambda _model: torch.empty(2**60, dtype=torch.uint8)),
        "ran out of memory on the host",
        "a smaller model",
    ),
    (ReasonCode.OUT_OF_MEMORY_HOST, "the kernel's"): (
        lambda p: p.ended(host_memory_killed=True),
        "host ran out of memory after step 7, and the kernel ended",
        "Try batch_size 16 with gradient_accumulation_steps 2",
    ),
    (ReasonCode.NON_FINITE_GRADIENTS, ""): (
        lambda p: p.broken(burst, precision=BF16),
        "its gradients were not finite",
        "Lower the learning rate",
    ),
    (ReasonCode.NON_FINITE_LOSS, ""): (
        lambda p: p.run(
            {
                "dataset": {"name": "synthetic", "params": SYNTHETIC | {"non_finite_steps": [2]}},
                "precision": BF16,
            }
        ),
        "its loss was not finite",
        "Look for bad samples",
    ),
    (ReasonCode.SCALE_EXHAUSTED, ""): (
        lambda p: p.run(
            {
                "dataset": {"name": "synthetic", "params": SYNTHETIC | {"input_scale": 3000.0}},
                "precision": SMALLEST,
            }
        ),
        "not finite at the smallest scale",
        "or lower min_scale",
    ),
    (ReasonCode.WORKER_LOST, "its process died"): (
        lambda p: p.ended(returncode=-11),
        "to its own code, a library or the host's memory",
        "then retry",
    ),
    (ReasonCode.WORKER_LOST, "its lease ran out"): (
        lambda p: p.lease_over(),
        "lost its worker",
        "a higher max_attempts",
    ),
    (ReasonCode.STALLED, ""): (
        lambda p: p.ended(killed_for="stalled"),
        "stopped making progress",
        "HALFSTEP_STALL_SECONDS",
    ),
    (ReasonCode.TIME_LIMIT, ""): (
        lambda p: p.run({"training": {"time_limit_seconds": 1e-6}}),
        "The time limit of 1e-06 s was reached",
        "Retry it from there",
    ),
    (ReasonCode.INVALID_COMPONENT, ""): (
        lambda p: p.run({"model": {"name": "mlpp"}}),
        "there is no model 'mlpp' on this worker",
        "use one of",
    ),
    (ReasonCode.DATA_ERROR, ""): (
        lambda p: p.run({"dataset": {"name": "text", "params": {"root": "/nowhere"}}}),
        "dataset 'text' may not read /nowhere",
        "ask the operator to add this one to HALFSTEP_TEXT_ROOTS",
    ),
    (ReasonCode.COMPONENT_ERROR, ""): (
        lambda p: p.broken(raising(KeyError("layer"))),
        "in a component's own code: KeyError: 'layer'",
        "correct the component",
    ),
    (ReasonCode.STORAGE_ERROR, ""): (
        lambda p: p.run({}, blocked=True),
        "could not be written to",
        "free disk space",
    ),
    (ReasonCode.CANCELLED_BY_USER, ""): (lambda p: p.cancelled(), "on request", "A retry"),
    (ReasonCode.NO_CAPABLE_WORKER, ""): (
        lambda p: p.unwanted(),
        "there was no worker of any kind",
        "Start one",
    ),
}


def test_every_reason_is_here() -> None:
    assert {code for code, _ in CAUSES} == set(ReasonCode)


@pytest.mark.parametrize("which", CAUSES, ids=lambda which: " ".join(which).strip())
def test_a_reason_says_whose_fault_it_is_and_what_to_try(place: Place, which: tuple[ReasonCode, str]) -> None:
    cause, whose, remedy = CAUSES[which]
    reason = cause(place)
    assert set(reason) == {"code", "message", "detail"}
    assert reason["code"] == which[0]
    assert whose in reason["message"]
    assert remedy in reason["message"]


def test_the_last_words_of_a_process_are_in_the_reason(place: Place) -> None:
    reason = place.ended(returncode=-11, last_words="Fatal: the head is gone")
    assert reason["detail"] == {
        "last": "the job's process ended with signal 11",
        "step": 7,
        "returncode": -11,
        "last_words": "Fatal: the head is gone",
    }


def test_a_reason_does_not_grow_with_what_a_process_prints(place: Place) -> None:
    reason = place.ended(returncode=1, last_words="x" * 1_000_000)
    assert len(reason["detail"]["last_words"]) == 8_000


def test_an_attempt_that_is_left_is_not_spent(place: Place) -> None:
    held = running(place.database, max_attempts=2)
    how = Ending(done=None, returncode=-11, killed_for=None, last_step=7, last_words="")
    write = conclusion(held, how, host_memory_killed=False)
    assert write is not None
    place.database.retry(write)
    assert state_of(place.database, held) is JobState.QUEUED


def test_memory_that_runs_out_outside_of_a_component_is_told_as_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint is taken, for one: the disk is not to blame."""

    def short(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "save", short)
    reason = place.run({})
    assert reason["code"] == ReasonCode.OUT_OF_MEMORY_HOST
    assert "batch_size 8" in reason["message"]


def test_a_defect_that_nobody_foresaw_leaves_its_traceback(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(execution, "train", defect)
    reason = place.run({})
    assert reason["code"] == ReasonCode.COMPONENT_ERROR
    assert "raised ZeroDivisionError" in reason["message"]
    assert "in defect" in reason["detail"]
