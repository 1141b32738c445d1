"""Checkpoints on disk: a crash at any instant leaves a whole one or none, and reading verifies.

A checkpoint is a directory whose name carries the fence and the step, with three files:

    model.safetensors   the model's parameters and buffers, deterministic bytes
    state.pt            tensors and primitives of everything else; loaded with weights_only, never unpickled
    manifest.json       version, fence, step, and the size and SHA-256 of the other two; written last

Each file is written to a temporary name in the same directory, fsynced and renamed; the directory is fsynced
before the manifest is written and after it. A checkpoint without a manifest does not exist. What is in the
state is the caller's business; no training happens here.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from service.faultpoints import reach
from worker.training.errors import CheckpointDamaged, StorageFailed

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
VERSION = 1

_NAME = re.compile(r"^fence-(\d{6,})-step-(\d{10,})(?:-rollback-\d+)?$")
_CHUNK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """A checkpoint as the job's record knows it.

    Attributes:
        step: optimizer steps taken before it.
        path: its directory.
        sha256: of its model.safetensors.
    """

    step: int
    path: Path
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint that was just written.

    Attributes:
        step: optimizer steps taken before it.
        path: its directory.
        bytes: size of all its files.
        sha256: of its model.safetensors, which is what a client downloads.
        metrics: figures of that moment, JSON values only.
    """

    step: int
    path: Path
    bytes: int
    sha256: str
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def ref(self) -> CheckpointRef:
        """What finds it again."""
        return CheckpointRef(step=self.step, path=self.path, sha256=self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The content of a checkpoint: the model's tensors by name, and a tree of tensors and primitives."""

    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(
    directory: Path,
    fence: int,
    step: int,
    payload: Payload,
    *,
    metrics: Mapping[str, float] | None = None,
    rollbacks: int = 0,
) -> CheckpointInfo:
    """Write a checkpoint below `directory` and return once it would survive a power cut.

    Args:
        directory: where the job's checkpoints are.
        fence: of the attempt that writes.
        step: optimizer steps taken.
        payload: what to write.
        metrics: figures to pass on with the result.
        rollbacks: how often the attempt went back; keeps its paths apart from those it abandoned.

    Raises:
        StorageFailed: the disk refused; what was begun is removed.
    """
    again = f"-rollback-{rollbacks}" if rollbacks else ""
    target = directory / f"fence-{fence:06d}-step-{step:010d}{again}"
    weights, aliases = _without_aliases(payload.weights)
    state = {
        "version": VERSION,
        "fence": fence,
        "step": step,
        "aliases": aliases,
        "state": dict(payload.state),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        files = {
            WEIGHTS_FILE: _write(
                target / WEIGHTS_FILE, lambda path: safetensors.torch.save_file(weights, path)
            ),
            STATE_FILE: _write(target / STATE_FILE, lambda path: torch.save(state, path)),
        }
        _sync_directory(target)
        reach("checkpoint.before_manifest")
        manifest = {"version": VERSION, "fence": fence, "step": step, "files": files}
        text = json.dumps(manifest, indent=1, sort_keys=True)
        written = _write(target / MANIFEST_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        _sync_directory(target)
        _sync_directory(directory)
        reach("checkpoint.after_manifest")
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError, safetensors as its own error.
        shutil.rmtree(target, ignore_errors=True)
        raise StorageFailed(
            f"the checkpoint of step {step} could not be written to {directory}: {error}; free disk space "
            "there or correct its permissions",
            detail={"step": step, "path": str(directory)},
        ) from error
    return CheckpointInfo(
        step=step,
        path=target,
        bytes=written["bytes"] + sum(entry["bytes"] for entry in files.values()),
        sha256=files[WEIGHTS_FILE]["sha256"],
        metrics=dict(metrics or {}),
    )


def load(ref: CheckpointRef) -> Payload:
    """Read a checkpoint back onto the CPU after verifying every byte of it against its manifest and `ref`.

    Raises:
        CheckpointDamaged: it is missing, truncated, altered, or another one than `ref` names.
    """
    manifest = _manifest(ref)
    for name, entry in manifest["files"].items():
        _verify(ref, name, entry)
    try:
        weights = safetensors.torch.load_file(ref.path / WEIGHTS_FILE)
        content = torch.load(ref.path / STATE_FILE, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # readers of altered files raise what they happen to stumble over
        raise _damaged(ref, f"cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise _damaged(ref, "was written by another version")
    if content["step"] != ref.step or content["fence"] != manifest["fence"]:
        raise _damaged(ref, f"holds the state of step {content['step']} of another run")
    for alias, original in content["aliases"].items():
        weights[alias] = weights[original]
    return Payload(weights=weights, state=content["state"])


def load_newest(
    refs: Sequence[CheckpointRef], on_damage: Callable[[CheckpointDamaged], None]
) -> tuple[CheckpointRef, Payload] | None:
    """The first of `refs` (newest first) that is whole.

    None when none is. Damage is reported, then passed over.
    """
    for ref in refs:
        try:
            return ref, load(ref)
        except CheckpointDamaged as damage:
            on_damage(damage)
    return None


def remove(refs: Sequence[CheckpointRef]) -> None:
    """Delete checkpoints, manifest first, so that a half-deleted one does not exist for a reader.

    Raises:
        StorageFailed: the disk refused.
    """
    for ref in refs:
        try:
            (ref.path / MANIFEST_FILE).unlink(missing_ok=True)
            if ref.path.exists():
                shutil.rmtree(ref.path)
        except OSError as error:
            raise StorageFailed(
                f"the old checkpoint {ref.path} cannot be removed: {error.strerror}"
            ) from error


def remove_unreferenced(directory: Path, keep: Sequence[CheckpointRef], *, below_fence: int) -> None:
    """Delete what crashes left behind: checkpoints under an older fence that no record names.

    A directory under the present fence is left alone, and so is everything that is not a checkpoint.
    """
    kept = {ref.path.name for ref in keep}
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        name = _NAME.match(path.name)
        if name and int(name.group(1)) < below_fence and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _manifest(ref: CheckpointRef) -> dict[str, Any]:
    try:
        manifest = json.loads((ref.path / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
        version, fence, step = manifest["version"], int(manifest["fence"]), int(manifest["step"])
    except FileNotFoundError as error:
        raise _damaged(ref, "has no manifest, so it was never finished or has been removed") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(ref, f"has an unreadable manifest: {error}") from error
    if version != VERSION or set(files) != {WEIGHTS_FILE, STATE_FILE}:
        raise _damaged(ref, "was written by another version")
    name = _NAME.match(ref.path.name)
    if step != ref.step or name is None or (fence, step) != (int(name.group(1)), int(name.group(2))):
        raise _damaged(ref, f"has the manifest of step {step}, fence {fence}")
    if files[WEIGHTS_FILE][1] != ref.sha256:
        raise _damaged(ref, "does not have the weights that were recorded")
    return {"fence": fence, "files": files}


def _verify(ref: CheckpointRef, name: str, entry: tuple[int, str]) -> None:
    size, sha256 = entry
    path = ref.path / name
    try:
        actual = path.stat().st_size
        if actual != size:
            raise _damaged(ref, f"has {actual} bytes in {name} instead of {size}")
        digest = _sha256(path)
    except OSError as error:
        raise _damaged(ref, f"cannot be read: {name}: {error.strerror}") from error
    if digest != sha256:
        raise _damaged(ref, f"has other bytes in {name} than were written")


def _damaged(ref: CheckpointRef, what: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"the checkpoint of step {ref.step} {what}", detail={"step": ref.step, "path": str(ref.path)}
    )


def _write(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        reach("checkpoint.after_write")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        reach("checkpoint.after_fsync")
        entry = {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
        temporary.replace(path)
        reach("checkpoint.after_rename")
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return entry


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_aliases(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, each stored once: safetensors refuses shared memory, and tied weights share it."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name in sorted(weights):
        tensor = weights[name].detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # A copy of its own: a view into a larger tensor would otherwise be refused.
        stored[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return stored, aliases
