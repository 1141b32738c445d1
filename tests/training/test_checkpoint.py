"""A checkpoint on disk is whole or absent, and nothing that was altered is ever loaded."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256
from worker.training import checkpoint
from worker.training.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointInfo,
    CheckpointRef,
    Payload,
)
from worker.training.errors import CheckpointDamaged, StorageFailed


def payload(value: float = 1.0) -> Payload:
    weight = torch.full((3, 4), value)
    return Payload(
        weights={"a.weight": weight, "b.tied": weight, "c.scalar": torch.tensor(value)},
        state={"step": 7, "nested": [{"x": torch.arange(5)}, None, "text", 1.5]},
    )


def saved(directory: Path, step: int = 7, value: float = 1.0, fence: int = 3) -> CheckpointInfo:
    return checkpoint.save(directory, fence, step, payload(value))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    info = saved(tmp_path)
    loaded = checkpoint.load(info.ref)
    assert loaded.weights.keys() == {"a.weight", "b.tied", "c.scalar"}
    assert torch.equal(loaded.weights["b.tied"], torch.ones(3, 4))
    assert loaded.weights["b.tied"] is loaded.weights["a.weight"]
    assert torch.equal(loaded.state["nested"][0]["x"], torch.arange(5))
    assert loaded.state["nested"][1:] == [None, "text", 1.5]
    assert "000003" in info.path.name
    assert info.bytes == sum(file.stat().st_size for file in info.path.iterdir())
    assert set(safetensors.torch.load_file(info.path / WEIGHTS_FILE)) == {"a.weight", "c.scalar"}


def test_equal_weights_have_equal_bytes_whatever_the_fence(tmp_path: Path) -> None:
    assert (
        saved(tmp_path, fence=1).sha256 == saved(tmp_path, fence=2).sha256 == saved(tmp_path, step=9).sha256
    )
    assert saved(tmp_path, fence=1).sha256 != saved(tmp_path, value=2.0, fence=4).sha256


def truncate(ref: CheckpointRef, name: str) -> None:
    path = ref.path / name
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(ref: CheckpointRef, name: str) -> None:
    content = bytearray((ref.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (ref.path / name).write_bytes(content)


def delete(ref: CheckpointRef, name: str) -> None:
    (ref.path / name).unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete])
@pytest.mark.parametrize("name", [WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE])
def test_a_damaged_file_is_found(
    tmp_path: Path, damage: Callable[[CheckpointRef, str], None], name: str
) -> None:
    ref = saved(tmp_path).ref
    damage(ref, name)
    with pytest.raises(CheckpointDamaged, match="checkpoint of step 7"):
        checkpoint.load(ref)


@pytest.mark.parametrize(
    "names",
    [[WEIGHTS_FILE], [STATE_FILE], [STATE_FILE, MANIFEST_FILE], [WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE]],
)
def test_files_of_another_checkpoint_are_found(tmp_path: Path, names: list[str]) -> None:
    ref, other = saved(tmp_path).ref, saved(tmp_path, step=8, value=2.0).ref
    for name in names:
        shutil.copy(other.path / name, ref.path / name)
    with pytest.raises(CheckpointDamaged):
        checkpoint.load(ref)


def test_another_step_with_the_same_weights_is_found(tmp_path: Path) -> None:
    ref, other = saved(tmp_path).ref, saved(tmp_path, step=8).ref
    assert ref.sha256 == other.sha256
    shutil.rmtree(ref.path)
    shutil.copytree(other.path, ref.path)
    with pytest.raises(CheckpointDamaged, match="manifest of step 8"):
        checkpoint.load(ref)


def rewrite_manifest(ref: CheckpointRef) -> None:
    """As someone would who can write the directory: the manifest agrees with the altered state."""
    manifest = json.loads((ref.path / MANIFEST_FILE).read_text())
    path = ref.path / STATE_FILE
    manifest["files"][STATE_FILE] = {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}
    (ref.path / MANIFEST_FILE).write_text(json.dumps(manifest))


class Bomb:
    went_off = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _explode, ()


def _explode() -> None:
    Bomb.went_off = True


@pytest.mark.parametrize(
    "write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2))]
)
def test_nothing_is_unpickled(tmp_path: Path, write: Callable[[object, Path], None]) -> None:
    ref = saved(tmp_path).ref
    write({"state": Bomb()}, ref.path / STATE_FILE)
    rewrite_manifest(ref)
    with pytest.raises(CheckpointDamaged):
        checkpoint.load(ref)
    assert not Bomb.went_off


def test_a_state_of_another_step_behind_a_matching_manifest_is_found(tmp_path: Path) -> None:
    ref, other = saved(tmp_path).ref, saved(tmp_path, step=8).ref
    shutil.copy(other.path / STATE_FILE, ref.path / STATE_FILE)
    rewrite_manifest(ref)
    with pytest.raises(CheckpointDamaged, match="state of step 8"):
        checkpoint.load(ref)


def test_the_order_of_writing_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is synced before its rename, the directory around the manifest, the parent last."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(f"sync {'dir ' if path.is_dir() else ''}{path.name.split('.tmp')[0]}")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    name = saved(tmp_path).path.name
    process = os.getpid()
    assert done == [
        f"sync .{WEIGHTS_FILE}.{process}",
        f"rename {WEIGHTS_FILE}",
        f"sync .{STATE_FILE}.{process}",
        f"rename {STATE_FILE}",
        f"sync dir {name}",
        f"sync .{MANIFEST_FILE}.{process}",
        f"rename {MANIFEST_FILE}",
        f"sync dir {name}",
        f"sync dir {tmp_path.name}",
    ]


@pytest.mark.parametrize("nth", range(6))
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    good = saved(tmp_path, step=6)
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailed, match="free disk space"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [good.path.name]
    checkpoint.load(good.ref)


def test_leftovers_of_older_attempts_are_removed(tmp_path: Path) -> None:
    kept, left, present = saved(tmp_path, fence=1), saved(tmp_path, step=8, fence=1), saved(tmp_path, fence=2)
    (tmp_path / "other").mkdir()
    checkpoint.remove_unreferenced(tmp_path, [kept.ref], below_fence=2)
    assert not left.path.exists()
    assert {path.name for path in tmp_path.iterdir()} == {kept.path.name, present.path.name, "other"}


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_resume_falls_back_to_the_checkpoint_before(tmp_path: Path, broken: int) -> None:
    training = {"checkpoint_every_steps": 2, "keep_checkpoints": 3}
    spec = job(training=training)
    _, whole = run(spec, tmp_path / "whole")
    recorder = Recorder()
    run(spec, tmp_path / "cut", recorder, stop_after=7)
    assert [ref.step for ref in recorder.refs] == [7, 6, 4]
    for ref in recorder.refs[:broken]:
        flip_a_bit(ref, STATE_FILE)
    expected = [7, 6, 4, 0][broken]
    outcome, _ = run(spec, tmp_path / "cut", recorder, fence=2)
    assert outcome.resumed_from == recorder.resumes[-1] == expected
    told = recorder.coded("checkpoint_damaged")
    assert [data["step"] for data in told] == [7, 6, 4][:broken]
    assert all(data["resumed_from"] == expected for data in told)
    assert same_numbers(recorder.rows, whole.rows)
    assert weights_sha256(recorder) == weights_sha256(whole)
