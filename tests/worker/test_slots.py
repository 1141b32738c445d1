"""The processes that wait at the slots: one each, handed out alive, replaced; and their environment."""

import os
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.errors import ConfigurationError
from halfstep.service.settings import Settings
from halfstep.worker.host import slots as slots_module
from halfstep.worker.host.devices import ALLOCATOR, build_slots, gpu_ids
from halfstep.worker.host.process import Spawner
from halfstep.worker.host.slots import Slot
from halfstep.worker.protocol import Ready
from tests.e2e.cluster import alive

READY = Ready(capability=None, components=[], versions={})


class Child:
    def __init__(self, environment: dict[str, str], *, probe: bool) -> None:
        self.environment, self.probe = environment, probe
        self.pid = id(self)
        self.alive = True
        self.discarded = False
        self.ready: Future[Ready] = Future()

    def discard(self) -> None:
        self.discarded = True


class Nursery:
    """A spawner that starts nothing."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def spawn(self, environment: dict[str, str], *, probe: bool = False) -> Child:
        self.children.append(Child(environment, probe=probe))
        return self.children[-1]


@pytest.fixture
def nursery() -> Nursery:
    return Nursery()


@pytest.fixture
def slot(nursery: Nursery) -> Slot:
    return Slot(0, "cpu", {"OMP_NUM_THREADS": "1"}, nursery)  # type: ignore[arg-type]


def test_a_job_takes_the_process_that_waits(slot: Slot, nursery: Nursery) -> None:
    waiting: Any = slot.warm_up()
    assert slot.warm_up() is waiting, "one process waits, however often it is asked for"
    assert slot.take() is waiting
    assert len(nursery.children) == 1


def test_the_next_job_has_a_process_of_its_own(slot: Slot, nursery: Nursery) -> None:
    slot.warm_up()
    first: Any = slot.take()
    second: Any = slot.warm_up()
    assert second is not first
    assert slot.take() is second
    assert not first.discarded, "its job is not the slot's to end"


def test_a_process_that_died_waiting_is_replaced(slot: Slot, nursery: Nursery) -> None:
    first: Any = slot.warm_up()
    first.alive = False
    second: Any = slot.warm_up()
    assert second is not first
    second.alive = False
    assert slot.take() is nursery.children[2]


def test_without_a_waiting_process_a_job_gets_a_new_one(slot: Slot, nursery: Nursery) -> None:
    assert slot.take() is nursery.children[0]
    assert not nursery.children[0].probe


def test_whether_a_process_is_ready_is_waited_for(
    slot: Slot, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Any = slot.warm_up()
    first.ready.set_result(READY)
    assert slot.wait_until_warm()
    assert slot.take() is first

    second: Any = slot.warm_up()
    second.ready.set_exception(RuntimeError("no torch here"))
    assert not slot.wait_until_warm()

    second.alive = False
    monkeypatch.setattr(slots_module, "READY_SECONDS", 0.05)
    assert not slot.wait_until_warm(), "it never is"
    assert nursery.children[2].discarded, "the next to ask gets another"


def test_a_closed_slot_ends_the_one_that_waits(slot: Slot, nursery: Nursery) -> None:
    slot.warm_up()
    slot.close()
    slot.close()
    assert [child.discarded for child in nursery.children] == [True]


def test_each_gpu_is_a_slot_that_sees_itself_alone(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f,-1")
    assert gpu_ids() == ["2", "GPU-5f"]
    slots = build_slots(Settings(data_dir=tmp_path), nursery)  # type: ignore[arg-type]
    assert [slot.device for slot in slots] == ["cuda:0", "cuda:0"]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "GPU-5f"]


def test_the_cores_are_shared_among_the_slots_of_a_cpu(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    settings = Settings(data_dir=tmp_path, worker_device="cpu", worker_slots=3)
    slots = build_slots(settings, nursery)  # type: ignore[arg-type]
    assert [slot.environment["OMP_NUM_THREADS"] for slot in slots] == ["2", "2", "2"]
    assert {slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots} == {""}


def test_a_gpu_worker_without_a_gpu_does_not_start(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigurationError, match="no NVIDIA GPU is visible"):
        build_slots(Settings(data_dir=tmp_path, worker_device="cuda"), nursery)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_real_one_waits_with_torch_imported_and_ends_when_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path))
    slot = Slot(0, "cpu", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, Spawner())
    child = slot.warm_up()
    assert child.ready.result(timeout=120).versions["torch"]
    assert "libtorch_cpu" in Path(f"/proc/{child.pid}/maps").read_text()
    assert child.alive, "it waits for an order"
    worker = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) > worker, "memory's end is the job's"
    slot.close()
    assert not alive(child.pid)


def environments(tmp_path: Path, **values: object) -> list[dict[str, str]]:
    settings = Settings(data_dir=tmp_path, worker_device="cpu", **values)
    return [slot.environment for slot in build_slots(settings, Spawner())]


def test_cpu_slots_share_the_threads(tmp_path: Path) -> None:
    found = environments(tmp_path, worker_slots=2, worker_threads=3)
    assert [each["OMP_NUM_THREADS"] for each in found] == ["3", "3"]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {""}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", *ALLOCATOR])
def test_how_a_job_waits_and_allocates_is_ours_unless_the_operator_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    (found,) = environments(tmp_path)
    assert found[name] == {"OMP_WAIT_POLICY": "PASSIVE", **ALLOCATOR}[name]
    monkeypatch.setenv(name, "theirs")
    (found,) = environments(tmp_path)
    assert found[name] == "theirs"


def test_what_torch_caches_stays_in_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (found,) = environments(tmp_path)
    assert Path(found["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    (found,) = environments(tmp_path)
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
