"""Checkpoints at a remote store: what it refuses costs a checkpoint, and what it loses is noticed in time."""

import errno
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.files.remote import Mirror
from halfstep.worker.training.checkpoints import reading, writing
from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.checkpoints.writing import (
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointInfo,
    CheckpointRef,
)
from halfstep.worker.training.errors import CheckpointDamaged, StorageFailed, TrainingFailure
from halfstep.worker.training.loop import CHECKPOINTS
from tests.stores import Store, cut, flip
from tests.training.conftest import Place
from tests.training.jobs import Recorder, job, run, same_numbers
from tests.training.test_checkpoint import payload, saved

FILES = [WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE]

AWAY = ConnectionError("connection refused")
NO_CREDENTIALS = PermissionError("Unable to locate credentials")
FULL = OSError(errno.ENOSPC, "quota exceeded")

# Where a store can fail while a checkpoint is stored: operation, number of its call, and what happens.
STAGES: dict[str, tuple[str, int, Any]] = {
    "away at the directory": ("makedirs", 0, AWAY),
    "no credentials": ("put", 0, NO_CREDENTIALS),
    "full at the weights": ("put", 0, FULL),
    "full at the state": ("put", 1, FULL),
    "away at the manifest": ("put", 2, AWAY),
    "away when the weights are looked at": ("open", 0, AWAY),
    "away when the manifest is looked at": ("open", 2, TimeoutError()),
    "weights cut": ("stored", 0, cut),
    "state cut": ("stored", 1, cut),
    "manifest cut": ("stored", 2, cut),
    "a bit of the weights": ("stored", 0, flip),
    "a bit of the state": ("stored", 1, flip),
    "a bit of the manifest": ("stored", 2, flip),
}


class Witness(Recorder):
    """Looks into the store whenever a checkpoint is to be referred to."""

    def __init__(self, store: Store, root: Path) -> None:
        super().__init__()
        self._store, self._root = store, root

    def at_store(self, ref: CheckpointRef) -> Path:
        return self._store.directory / ref.path.relative_to(self._root)

    def checkpointed(self, info: CheckpointInfo) -> None:
        elsewhere = Mirror(f"file://{self._store.directory}", self._root / "another", seconds=60)
        place = self._root / "another" / info.path.relative_to(self._root)
        load(CheckpointRef(**{**_fields(info.ref), "path": place}), elsewhere)
        super().checkpointed(info)


def _fields(ref: CheckpointRef) -> Mapping[str, Any]:
    return {name: getattr(ref, name) for name in ref.__dataclass_fields__}


def names_at(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_is_whole_at_the_store_before_it_is_referred_to(tmp_path: Path, store: Store) -> None:
    spec = job(training={"checkpoint_every_steps": 2, "keep_best_checkpoint": False})
    recorder = Witness(store, tmp_path)
    run(spec, tmp_path / "jobs", recorder, mirror=store.mirror(tmp_path))
    assert [info.step for info in recorder.infos] == [2, 4, 6, 8, 10, 12]
    stored = [name for operation, name in store.calls if operation == "put"]
    assert stored == FILES * 6
    # Keep-N holds there as well, and nothing is left on the disk.
    assert [ref.step for ref in recorder.refs] == [12, 10]
    assert names_at(recorder.at_store(recorder.refs[0]).parent) == sorted(r.path.name for r in recorder.refs)
    assert names_at(tmp_path / "jobs" / CHECKPOINTS) == []


def test_the_best_stays_at_the_store(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.service.contract.metrics import Evaluation
    from halfstep.worker.training import run as run_module

    def evaluate(*_: Any, step: int, **__: Any) -> Evaluation:
        loss = 1.0 if step == 4 else 9.0
        return Evaluation(step=step, split="held_out", loss=loss, metrics={}, seconds=0.0)

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    spec = job(training={"checkpoint_every_steps": 2, "evaluate_every_steps": 2})
    recorder = Witness(store, tmp_path)
    mirror = store.mirror(tmp_path)
    run(spec, tmp_path / "jobs", recorder, mirror=mirror)
    assert [ref.step for ref in recorder.refs] == [12, 10, 4]
    for ref in recorder.refs:
        load(ref, mirror)
    assert len(names_at(recorder.at_store(recorder.refs[0]).parent)) == 3


@pytest.mark.parametrize("stop_after", [1, 5, 7])
def test_another_host_goes_on_to_the_bit(tmp_path: Path, store: Store, stop_after: int) -> None:
    spec = job(training={"checkpoint_every_steps": 3})
    _, whole = run(spec, tmp_path / "whole")
    first, second = tmp_path / "a", tmp_path / "b"
    _, recorder = run(spec, first / "j", stop_after=stop_after, mirror=store.mirror(first))
    recorder.refs = [
        CheckpointRef(**{**_fields(ref), "path": second / ref.path.relative_to(first)})
        for ref in recorder.refs
    ]
    outcome, _ = run(spec, second / "j", recorder, fence=2, mirror=store.mirror(second))
    assert outcome.resumed_from == stop_after
    assert same_numbers(recorder.rows, whole.rows)
    assert recorder.refs[0].sha256 == whole.refs[0].sha256
    assert names_at(second / "j" / CHECKPOINTS) == []


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_store_refuses_costs_a_checkpoint_and_not_the_job(
    tmp_path: Path, store: Store, stage: str
) -> None:
    spec = job(training={"checkpoint_every_steps": 4, "epochs": 2})
    _, whole = run(spec, tmp_path / "whole")
    store.fails(*STAGES[stage])
    recorder = Witness(store, tmp_path)
    outcome, _ = run(spec, tmp_path / "cut", recorder, mirror=store.mirror(tmp_path))
    assert outcome.step == 8
    [told] = recorder.coded("checkpoint_failed")
    assert told["step"] == 4
    [said] = [message for _, _, message, data in recorder.events if data.get("code") == "checkpoint_failed"]
    assert "HALFSTEP_CHECKPOINT_URL" in said
    assert [info.step for info in recorder.infos] == [8]
    assert same_numbers(recorder.rows, whole.rows)
    assert recorder.refs[0].sha256 == whole.refs[0].sha256
    assert names_at(tmp_path / "cut" / CHECKPOINTS) == []
    assert names_at(recorder.at_store(recorder.refs[0]).parent) == [recorder.refs[0].path.name]


@pytest.mark.parametrize("stage", STAGES)
def test_at_the_end_it_is_a_clear_failure_and_the_one_before_stays(
    tmp_path: Path, store: Store, stage: str
) -> None:
    spec = job(training={"checkpoint_every_steps": 5})
    recorder, mirror = Witness(store, tmp_path), store.mirror(tmp_path)
    run(spec, tmp_path / "j", recorder, stop_after=11, mirror=mirror)
    kept = list(recorder.refs)
    operation, number, fault = STAGES[stage]
    # Reading the one to go on from opens three files.
    store.fails(operation, number + 3 if operation == "open" else number, fault)
    with pytest.raises(StorageFailed) as failure:
        run(spec, tmp_path / "j", recorder, fence=2, mirror=mirror)
    assert failure.value.code == "storage_error"
    assert recorder.refs == kept
    for ref in kept:
        load(ref, mirror)


def test_a_store_that_hangs_costs_a_bounded_wait_and_its_late_answer_nothing(
    tmp_path: Path, store: Store
) -> None:
    """A drain at the step whose checkpoint hung saves once more, elsewhere than what may still come."""
    store.fails("put", 1, store.hang)
    mirror = store.mirror(tmp_path, seconds=3.0)
    recorder = Witness(store, tmp_path)
    spec = job(training={"checkpoint_every_steps": 4})
    run(spec, tmp_path / "j", recorder, stop_after=4, mirror=mirror)
    [told] = recorder.coded("checkpoint_failed")
    assert told["step"] == 4
    [ref] = recorder.refs
    assert ref.path.name == "fence-000001-step-0000000004-again-1"
    [late] = mirror._hanging
    store.released.set()
    late.join(20)
    load(ref, mirror)
    outcome, _ = run(spec, tmp_path / "j", recorder, fence=2, mirror=mirror)
    assert outcome.resumed_from == 4
    # What was given up is removed by the next attempt.
    assert names_at(recorder.at_store(ref).parent) == sorted(each.path.name for each in recorder.refs)


def test_leftovers_of_older_attempts_are_removed_and_nothing_else(place: Place) -> None:
    kept, left, present = place.saved(fence=1), place.saved(step=8, fence=1), place.saved(fence=2)
    (place.kept(kept).path.parent / "other").mkdir()
    (place.directory / f"{writing.FETCHED}left").mkdir()
    writing.remove_unreferenced(place.directory, [kept], below_fence=2, mirror=place.mirror)
    assert not place.kept(left).path.exists()
    assert names_at(place.kept(kept).path.parent) == [kept.path.name, present.path.name, "other"]
    assert place.mirror is None or names_at(place.directory) == []


@pytest.mark.parametrize("operation", ["rm", "rm_file", "ls"])
def test_what_cannot_be_removed_costs_space_and_not_the_job(
    tmp_path: Path, store: Store, operation: str
) -> None:
    class Forgiving(Recorder):
        def superseded(self, checkpoints: Any) -> None:
            try:
                super().superseded(checkpoints)
            except TrainingFailure as error:
                refused.append(error.message)

    refused: list[str] = []
    store.fails(operation, None, AWAY)
    recorder = Forgiving()
    spec = job(training={"checkpoint_every_steps": 2})
    run(spec, tmp_path, recorder, stop_after=7, mirror=store.mirror(tmp_path))
    outcome, _ = run(spec, tmp_path, recorder, fence=2, mirror=store.mirror(tmp_path))
    assert outcome.step == 12
    assert bool(refused) is (operation != "ls")


def test_one_bad_transfer_is_no_damage(tmp_path: Path, store: Store) -> None:
    """A checkpoint that is called damaged is dropped with its files."""
    mirror = store.mirror(tmp_path)
    ref = writing.save(tmp_path / "j", 3, 7, payload(), mirror=mirror).ref
    whole = {name: (store.directory / "j" / ref.path.name / name).read_bytes() for name in FILES}

    def once(path: str) -> None:
        store.recover()
        flip(path)
        store.fails("open", 2, lambda _: Path(path).write_bytes(whole[Path(path).name]))

    store.fails("open", 1, once)
    load(ref, mirror)


def test_a_store_that_is_away_is_waited_for_and_says_nothing_of_what_it_has(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(training={"checkpoint_every_steps": 2})
    mirror = store.mirror(tmp_path)
    recorder = Recorder()
    run(spec, tmp_path, recorder, stop_after=5, mirror=mirror)
    refs, rows = list(recorder.refs), list(recorder.rows)
    monkeypatch.setattr(reading, "AGAIN_SECONDS", 0.01)
    tries = threading.Semaphore(0)

    def away(_path: str) -> None:
        tries.release()
        raise AWAY

    store.fails("open", None, away)
    with pytest.raises(StorageFailed, match=r"cannot be reached from this worker.*connection refused"):
        run(spec, tmp_path, recorder, fence=2, mirror=store.mirror(tmp_path, seconds=0.5))
    assert (recorder.refs, recorder.rows) == (refs, rows)
    assert all(tries.acquire(blocking=False) for _ in range(2))
    store.recover()
    store.fails("open", 0, AWAY)
    outcome, _ = run(spec, tmp_path, recorder, fence=3, mirror=mirror)
    assert outcome.resumed_from == 5


def test_an_empty_store_is_the_wrong_one_and_no_damage(tmp_path: Path, store: Store) -> None:
    spec = job(training={"checkpoint_every_steps": 2})
    mirror = store.mirror(tmp_path)
    recorder = Recorder()
    run(spec, tmp_path, recorder, stop_after=5, mirror=mirror)
    refs, rows = list(recorder.refs), list(recorder.rows)
    store.directory.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed, match="is empty"):
        run(spec, tmp_path, recorder, fence=2, mirror=mirror)
    assert (recorder.refs, recorder.rows) == (refs, rows)


def test_a_checkpoint_from_before_there_was_a_store_is_gone_on_from(tmp_path: Path, store: Store) -> None:
    spec = job(training={"checkpoint_every_steps": 2})
    _, recorder = run(spec, tmp_path / "j", stop_after=5)
    outcome, _ = run(spec, tmp_path / "j", recorder, fence=2, mirror=store.mirror(tmp_path))
    assert outcome.resumed_from == 5
    ref = saved(tmp_path / "k").ref
    load(ref, store.mirror(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (WEIGHTS_FILE, r"bytes in model\.safetensors"),
        (STATE_FILE, r"bytes in state\.pt"),
        (MANIFEST_FILE, "a manifest that is far too long"),
    ],
)
def test_a_file_that_is_far_too_long_is_not_fetched_whole(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    mirror = store.mirror(tmp_path)
    ref = writing.save(tmp_path / "j", 3, 7, payload(), mirror=mirror).ref
    with (store.directory / "j" / ref.path.name / name).open("r+b") as file:
        file.truncate(2**26)
    fetched: list[int] = []
    real = Mirror.fetch

    def fetch(self: Mirror, directory: Path, name: str, target: Path, **bounds: Any) -> bool:
        found = real(self, directory, name, target, **bounds)
        fetched.append(target.stat().st_size)
        return found

    monkeypatch.setattr(Mirror, "fetch", fetch)
    with pytest.raises(CheckpointDamaged, match=words):
        load(ref, mirror)
    assert max(fetched) < 2**22
