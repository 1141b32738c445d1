"""Nothing that was altered is ever loaded or mistaken for another; a resume goes on without it."""

import dataclasses
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from halfstep.worker.training.checkpoints import reading, writing
from halfstep.worker.training.checkpoints.reading import load, load_newest
from halfstep.worker.training.checkpoints.writing import (
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointRef,
)
from halfstep.worker.training.errors import CheckpointDamaged, StorageFailed
from tests.training.conftest import Place
from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256
from tests.training.test_checkpoint import saved

FILES = [WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE]


def truncate(ref: CheckpointRef, name: str) -> None:
    path = ref.path / name
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(ref: CheckpointRef, name: str) -> None:
    with (ref.path / name).open("ab") as file:
        file.write(b"\0")


def empty(ref: CheckpointRef, name: str) -> None:
    (ref.path / name).write_bytes(b"")


def flip_a_bit(ref: CheckpointRef, name: str) -> None:
    content = bytearray((ref.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (ref.path / name).write_bytes(content)


def delete(ref: CheckpointRef, name: str) -> None:
    (ref.path / name).unlink()


def link(ref: CheckpointRef, name: str) -> None:
    """To a file with the very bytes: still nothing that this checkpoint wrote."""
    elsewhere = ref.path.parent / "elsewhere"
    (ref.path / name).rename(elsewhere)
    (ref.path / name).symlink_to(elsewhere)


def pipe(ref: CheckpointRef, name: str) -> None:
    (ref.path / name).unlink()
    os.mkfifo(ref.path / name)


def directory(ref: CheckpointRef, name: str) -> None:
    (ref.path / name).unlink()
    (ref.path / name).mkdir()


@pytest.mark.parametrize("damage", [truncate, lengthen, empty, flip_a_bit, delete, directory])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found(
    place: Place, damage: Callable[[CheckpointRef, str], None], name: str
) -> None:
    ref = place.saved()
    damage(place.kept(ref), name)
    with pytest.raises(CheckpointDamaged, match="checkpoint of step 7"):
        place.load(ref)


@pytest.mark.parametrize("damage", [link, pipe])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_its_own_is_found(
    tmp_path: Path, damage: Callable[[CheckpointRef, str], None], name: str
) -> None:
    ref = saved(tmp_path).ref
    damage(ref, name)
    with pytest.raises(CheckpointDamaged, match="checkpoint of step 7"):
        load(ref)


def places(length: int, place: Place) -> range:
    """All; where each try costs two transfers, some."""
    return range(0, length, 1 if place.mirror is None else 1 + length // 40)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(place: Place, name: str, recorded: bool) -> None:
    """Every byte of every file. Without the recorded hash a manifest may change where it says the same."""
    ref = place.saved()
    if not recorded:
        ref = dataclasses.replace(ref, manifest_sha256=None)
    path = place.kept(ref).path / name
    whole = path.read_bytes()
    expected = place.load(ref)
    for at in places(len(whole), place):
        altered = bytearray(whole)
        altered[at] ^= 1 << at % 8
        path.write_bytes(altered)
        if not recorded and name == MANIFEST_FILE:
            try:
                found = place.load(ref)
            except CheckpointDamaged:
                continue
            assert torch.equal(found.weights["a.weight"], expected.weights["a.weight"])
            continue
        with pytest.raises(CheckpointDamaged):
            place.load(ref)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_found(place: Place, name: str) -> None:
    ref = place.saved()
    path = place.kept(ref).path / name
    whole = path.read_bytes()
    for length in places(len(whole), place):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointDamaged):
            place.load(ref)


@pytest.mark.parametrize(
    "names",
    [[WEIGHTS_FILE], [STATE_FILE], [MANIFEST_FILE], [STATE_FILE, MANIFEST_FILE], FILES],
)
def test_files_of_another_checkpoint_are_found(place: Place, names: list[str]) -> None:
    ref, other = place.saved(), place.saved(step=8, value=2.0)
    for name in names:
        shutil.copy(place.kept(other).path / name, place.kept(ref).path / name)
    with pytest.raises(CheckpointDamaged):
        place.load(ref)


@pytest.mark.parametrize("recorded", [True, False])
def test_another_step_with_the_same_weights_is_found(place: Place, recorded: bool) -> None:
    ref, other = place.saved(), place.saved(step=8)
    assert ref.sha256 == other.sha256
    shutil.rmtree(place.kept(ref).path)
    shutil.copytree(place.kept(other).path, place.kept(ref).path)
    with pytest.raises(CheckpointDamaged, match="another manifest" if recorded else "manifest of step 8"):
        place.load(ref if recorded else dataclasses.replace(ref, manifest_sha256=None))


@pytest.mark.parametrize("recorded", [True, False])
def test_other_weights_of_the_same_step_are_found(place: Place, recorded: bool) -> None:
    ref = place.saved()
    assert place.saved(value=2.0).path == ref.path
    with pytest.raises(
        CheckpointDamaged, match="another manifest" if recorded else "weights that were recorded"
    ):
        place.load(ref if recorded else dataclasses.replace(ref, manifest_sha256=None))


def test_what_is_far_too_long_is_not_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = place.saved()
    os.truncate(place.kept(ref).path / STATE_FILE, 2**26)
    hashed: list[int] = []

    def sha256_of(file: io.BufferedReader) -> str:
        hashed.append(os.fstat(file.fileno()).st_size)
        return writing.sha256_of(file)

    monkeypatch.setattr(reading, "sha256_of", sha256_of)
    with pytest.raises(CheckpointDamaged, match=r"bytes in state\.pt instead of"):
        place.load(ref)
    assert max(hashed, default=0) < 2**22


def test_a_link_in_the_place_of_the_directory_is_found(tmp_path: Path) -> None:
    ref = saved(tmp_path).ref
    ref.path.rename(tmp_path / "elsewhere")
    ref.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointDamaged, match="link"):
        load(ref)


def test_a_disk_that_answers_with_errors_does_not_cost_the_job_its_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [saved(tmp_path, step=step).ref for step in (9, 8)]
    real = os.open
    broken = {refs[0].path}

    def failing(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).parent in broken:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    told: list[CheckpointDamaged] = []
    found = load_newest(refs, told.append)
    assert found is not None
    assert found[0].step == 8
    assert [damage.detail["step"] for damage in told] == [9]
    broken.add(refs[1].path)
    with pytest.raises(StorageFailed, match="look after the disk"):
        load_newest(refs, told.append)


@pytest.mark.parametrize("how", ["not mounted", "not permitted"])
def test_a_place_that_is_not_there_says_nothing_of_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Neither damage nor a reason to begin again: the record of the job stays as it is."""
    spec = job(training={"checkpoint_every_steps": 2})
    recorder = Recorder()
    run(spec, tmp_path, recorder, stop_after=5)
    refs, rows = list(recorder.refs), list(recorder.rows)
    if how == "not mounted":
        (tmp_path / "checkpoints").rename(tmp_path / "away")
    else:

        def refused(*_: Any, **__: Any) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(reading.os, "open", refused)
    with pytest.raises(StorageFailed, match="cannot be reached from this worker"):
        run(spec, tmp_path, recorder, fence=2)
    assert (recorder.refs, recorder.rows) == (refs, rows)


@pytest.mark.parametrize("broken", [1, 2, 3])
@pytest.mark.parametrize("name", FILES)
def test_a_resume_falls_back_to_the_checkpoint_before(place: Place, broken: int, name: str) -> None:
    training = {"checkpoint_every_steps": 2, "keep_checkpoints": 3, "keep_best_checkpoint": False}
    spec = job(training=training)
    directory = place.directory.parent
    _, whole = run(spec, place.root / "whole")
    recorder = Recorder()
    run(spec, directory, recorder, stop_after=7, mirror=place.mirror)
    assert [ref.step for ref in recorder.refs] == [7, 6, 4]
    for ref in recorder.refs[:broken]:
        flip_a_bit(place.kept(ref), name)
    expected = [7, 6, 4, 0][broken]
    outcome, _ = run(spec, directory, recorder, fence=2, mirror=place.mirror)
    assert outcome.resumed_from == recorder.resumes[-1] == expected
    told = recorder.coded("checkpoint_damaged")
    assert [data["step"] for data in told] == [7, 6, 4][:broken]
    assert all(data["resumed_from"] == expected for data in told)
    assert same_numbers(recorder.rows, whole.rows)
    assert recorder.refs[0].sha256 == weights_sha256(whole)
    left = place.kept(recorder.refs[0]).path.parent.iterdir()
    assert {path.name for path in left} == {ref.path.name for ref in recorder.refs}


def test_memory_that_runs_out_while_loading_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole checkpoint would be dropped for it, and its steps taken again."""
    ref = saved(tmp_path).ref

    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", short)
        with pytest.raises(RuntimeError, match="not enough memory"):
            load_newest([ref], lambda damage: pytest.fail(damage.message))
    load(ref)


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    info = saved(tmp_path)
    loaded = load(info.ref)
    assert loaded.weights.keys() == {"a.weight", "b.tied", "c.scalar"}
    assert loaded.weights["b.tied"] is loaded.weights["a.weight"]
    assert set(safetensors.torch.load_file(info.path / WEIGHTS_FILE)) == {"a.weight", "c.scalar"}
