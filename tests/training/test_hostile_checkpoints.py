"""Checkpoints by someone who can write the files and the record: nothing of them is executed or trusted."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.worker.training.checkpoints import reading
from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.checkpoints.writing import (
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointRef,
)
from halfstep.worker.training.errors import CheckpointDamaged
from tests.training.conftest import Place
from tests.training.test_checkpoint import saved


def agreeing(ref: CheckpointRef, **changes: Any) -> CheckpointRef:
    """The reference as of one who can write files *and* record: every hash agrees with what is there."""
    manifest = json.loads((ref.path / MANIFEST_FILE).read_text()) | changes
    for name in (WEIGHTS_FILE, STATE_FILE):
        content = (ref.path / name).read_bytes()
        manifest["files"].setdefault(name, {})
        manifest["files"][name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(manifest)
    (ref.path / MANIFEST_FILE).write_text(text)
    return dataclasses.replace(
        ref,
        sha256=manifest["files"][WEIGHTS_FILE]["sha256"],
        manifest_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


class Bomb:
    went_off = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _explode, ()


def _explode() -> None:
    Bomb.went_off = True


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))


def _saved_by_torch(path: Path) -> None:
    torch.save({"version": 1, "step": 7, "fence": 3, "aliases": {}, "state": Bomb()}, path)


def _saved_the_old_way(path: Path) -> None:
    torch.save({"state": Bomb()}, path, _use_new_zipfile_serialization=False)


def _torch_script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), protocol=2))
        archive.writestr("archive/constants.pkl", pickle.dumps(Bomb(), protocol=2))
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("name", [WEIGHTS_FILE, STATE_FILE])
@pytest.mark.parametrize("write", [_pickled, _saved_by_torch, _saved_the_old_way, _torch_script])
def test_nothing_is_unpickled_whatever_the_hashes_say(
    place: Place, write: Callable[[Path], None], name: str
) -> None:
    ref = place.saved()
    kept = place.kept(ref)
    write(kept.path / name)
    with pytest.raises(CheckpointDamaged):
        place.load(dataclasses.replace(agreeing(kept), path=ref.path))
    assert not Bomb.went_off


def test_nothing_of_a_bomb_is_even_parsed_where_the_record_is_right(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = place.saved()
    _saved_by_torch(place.kept(ref).path / STATE_FILE)
    agreeing(place.kept(ref))
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(CheckpointDamaged, match="another manifest"):
        place.load(ref)


def _huge_tensor() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return len(header).to_bytes(8, "little") + header


def _huge_header() -> bytes:
    return (2**62).to_bytes(8, "little") + b"{}"


def _overlapping() -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize("make", [_huge_tensor, _huge_header, _overlapping])
def test_weights_that_declare_what_is_not_there_are_found(tmp_path: Path, make: Callable[[], bytes]) -> None:
    ref = saved(tmp_path).ref
    (ref.path / WEIGHTS_FILE).write_bytes(make())
    with pytest.raises(CheckpointDamaged):
        load(agreeing(ref))


def test_a_tensor_that_declares_more_than_its_storage_is_found(tmp_path: Path) -> None:
    ref = saved(tmp_path).ref
    buffer = io.BytesIO()
    state = {"x": torch.arange(4)}
    torch.save({"version": 1, "step": 7, "fence": 3, "aliases": {}, "state": state}, buffer)
    with zipfile.ZipFile(buffer) as written, zipfile.ZipFile(ref.path / STATE_FILE, "w") as hostile:
        for name in written.namelist():
            content = written.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"K\x04\x85") == 1  # the shape (4,)
                content = content.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
            hostile.writestr(name, content)
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        load(agreeing(ref))


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b"[" * 60_000,
        b'{"version": 1, "fence": 3, "step": 7, "files": []}',
        b'{"version": 1, "fence": 3, "step": 7, "files": {}}',
        b'{"version": 1, "fence": 3, "step": 1e999, "files": {}}',
        b'{"version": 2, "fence": 3, "step": 7, "files": {"model.safetensors": {"bytes": 1, "sha256": ""}}}',
        b'{"version": 1, "fence": 3, "step": 7, "files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
        b'{"version": 1, "fence": 3, "step": 7, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
        b'{"version": 1, "fence": 3, "step": 7, "files": {"model.safetensors": {"bytes": "x", "sha256": 1}}}',
        b" " * (reading.MAX_MANIFEST_BYTES + 1),
    ],
    ids=range(15),
)
def test_a_manifest_of_any_kind_is_damage_and_no_accident(tmp_path: Path, manifest: bytes) -> None:
    ref = saved(tmp_path).ref
    (ref.path / MANIFEST_FILE).write_bytes(manifest)
    with pytest.raises(CheckpointDamaged):
        load(dataclasses.replace(ref, manifest_sha256=hashlib.sha256(manifest).hexdigest()))


def test_only_the_two_files_of_the_directory_are_ever_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = saved(tmp_path).ref
    ref = agreeing(ref, files={"../secret": {"bytes": 1, "sha256": "0" * 64}})
    opened: list[str] = []
    real = os.open

    def watch(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", watch)
    with pytest.raises(CheckpointDamaged):
        load(ref)
    assert all(Path(path).parent == ref.path for path in opened)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"version": 1},
        {"version": 1, "step": 8, "fence": 3, "aliases": {}, "state": {}},
        {"version": 1, "step": 7, "fence": 9, "aliases": {}, "state": {}},
        {"version": 1, "step": 7, "fence": 3, "aliases": {"x": "no such"}, "state": {}},
        {"version": 1, "step": 7, "fence": 3, "aliases": [], "state": {}},
        {"version": 1, "step": 7, "fence": 3, "aliases": {}},
        {"version": 2, "step": 7, "fence": 3, "aliases": {}, "state": {}},
    ],
    ids=range(9),
)
def test_a_state_of_another_shape_is_found(tmp_path: Path, content: Any) -> None:
    ref = saved(tmp_path).ref
    torch.save(content, ref.path / STATE_FILE)
    with pytest.raises(CheckpointDamaged):
        load(agreeing(ref))
