"""Checkpoints on disk: a crash at any instant leaves a whole one or none.

A checkpoint is a directory whose name carries the fence and the step, with three files:

    model.safetensors   the model's parameters and buffers, deterministic bytes
    state.pt            tensors and primitives of everything else
    manifest.json       version, fence, step, and the size and SHA-256 of the other two; written last

Each file is written to a temporary name in the same directory, fsynced and renamed; the directory is fsynced
before the manifest is written and after it. A checkpoint without a manifest does not exist. With a mirror it
is written so first, then copied there file by file, the manifest last, each compared as the store gives it
back; the local one goes. Reading one back, and how it is verified, is in `restoring`; what is in the state is
the caller's business.
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
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from halfstep.service.faultpoints import reach
from halfstep.service.files.remote import Mirror, MirrorFailed
from halfstep.worker.training.errors import StorageFailed
from halfstep.worker.training.failures import ran_out_of_host_memory

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
VERSION = 1

HELD_OUT_LOSS = "held_out_loss"
"""The figure that decides which checkpoint is the best."""

NAME = re.compile(r"^fence-(\d{6,})-step-(\d{10,})(?:-rollback-\d+)?(?:-again-\d+)?$")
FETCHED = ".fetched-"
"""Begins the name of a directory in which files from a mirror are looked at."""

_CHUNK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """A checkpoint as the job's record knows it.

    Attributes:
        step: optimizer steps taken before it.
        path: its directory.
        sha256: of its model.safetensors.
        manifest_sha256: of its manifest.json; None in records of before it was kept.
        held_out_loss: of the evaluation at its step; None without one.
    """

    step: int
    path: Path
    sha256: str
    manifest_sha256: str | None = None
    held_out_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint that was just written.

    Attributes:
        step: optimizer steps taken before it.
        path: its directory.
        bytes: size of all its files.
        sha256: of its model.safetensors, which is what a client downloads.
        manifest_sha256: of its manifest.json, which covers the rest.
        metrics: figures of that moment, JSON values only.
    """

    step: int
    path: Path
    bytes: int
    sha256: str
    manifest_sha256: str
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def ref(self) -> CheckpointRef:
        """What finds it again."""
        return CheckpointRef(
            step=self.step,
            path=self.path,
            sha256=self.sha256,
            manifest_sha256=self.manifest_sha256,
            held_out_loss=self.metrics.get(HELD_OUT_LOSS),
        )


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
    failures: int = 0,
    mirror: Mirror | None = None,
) -> CheckpointInfo:
    """Write a checkpoint below `directory` and return once it would survive a power cut.

    With a mirror, return once that has given every byte back; nothing is left in `directory` then.

    Args:
        directory: where the job's checkpoints are.
        fence: of the attempt that writes.
        step: optimizer steps taken.
        payload: what to write.
        metrics: figures to pass on with the result.
        rollbacks: how often the attempt went back; keeps its paths apart from those it abandoned.
        failures: how often the attempt failed to save; a transfer that was given up may still be under way.
        mirror: where it is to be kept; None: below `directory`.

    Raises:
        StorageFailed: the disk or the mirror refused; what was begun is removed.
        RuntimeError: the host's memory ran out; what was begun is removed.
    """
    again = f"-rollback-{rollbacks}" if rollbacks else ""
    again += f"-again-{failures}" if failures else ""
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
        if mirror is not None:
            copied = {**files, MANIFEST_FILE: written}  # in this order
            mirror.put(target, {name: (entry["bytes"], entry["sha256"]) for name, entry in copied.items()})
            shutil.rmtree(target, ignore_errors=True)
    except MirrorFailed as error:
        shutil.rmtree(target, ignore_errors=True)
        raise StorageFailed(
            f"the checkpoint of step {step} could not be kept: {error.message}; look after that store, its "
            "credentials and the way there, or set HALFSTEP_CHECKPOINT_URL to another",
            detail={"step": step, "path": target.name},
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError, safetensors as its own error.
        shutil.rmtree(target, ignore_errors=True)
        if ran_out_of_host_memory(error):  # no fault of the disk
            raise
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
        manifest_sha256=written["sha256"],
        metrics=dict(metrics or {}),
    )


def retained(refs: Sequence[CheckpointRef], newest: int, *, best: bool) -> list[CheckpointRef]:
    """Of `refs`, newest first: the first `newest`, and with `best` the one with the lowest held-out loss."""
    kept = list(refs[:newest])
    evaluated = [
        (ref.held_out_loss, index) for index, ref in enumerate(refs) if ref.held_out_loss is not None
    ]
    if best and evaluated:
        winner = refs[min(evaluated)[1]]
        if winner not in kept:
            kept.append(winner)
    return kept


def remove(refs: Sequence[CheckpointRef], mirror: Mirror | None = None) -> None:
    """Delete checkpoints, manifest first, so that a half-deleted one does not exist for a reader.

    Raises:
        StorageFailed: the disk or the mirror refused.
    """
    for ref in refs:
        try:
            (ref.path / MANIFEST_FILE).unlink(missing_ok=True)
            if ref.path.exists():
                shutil.rmtree(ref.path)
            if mirror is not None:
                mirror.remove(ref.path, first=MANIFEST_FILE)
        except OSError as error:
            raise StorageFailed(
                f"the old checkpoint {ref.path} cannot be removed: {error.strerror}"
            ) from error


def remove_unreferenced(
    directory: Path, keep: Sequence[CheckpointRef], *, below_fence: int, mirror: Mirror | None = None
) -> None:
    """Delete what crashes left behind: checkpoints under an older fence that no record names.

    A directory under the present fence is left alone, and so is everything that is not a checkpoint. What a
    mirror refuses to remove stays.
    """
    kept = {ref.path.name for ref in keep}

    def left(found: str) -> bool:
        name = NAME.match(found)
        return name is not None and int(name.group(1)) < below_fence and found not in kept

    for path in directory.iterdir() if directory.is_dir() else ():
        if left(path.name) or path.name.startswith(FETCHED):
            shutil.rmtree(path, ignore_errors=True)
    if mirror is not None and below_fence > 1:
        with contextlib.suppress(MirrorFailed):
            for found in filter(left, mirror.names(directory)):
                mirror.remove(directory / found, first=MANIFEST_FILE)


def _write(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        reach("checkpoint.after_write")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        reach("checkpoint.after_fsync")
        with temporary.open("rb") as file:
            entry = {"bytes": temporary.stat().st_size, "sha256": sha256_of(file)}
        temporary.replace(path)
        reach("checkpoint.after_rename")
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return entry


def sha256_of(file: IO[bytes]) -> str:
    """Of what is left of the file, in hexadecimal."""
    digest = hashlib.sha256()
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
