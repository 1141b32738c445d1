"""Reading checkpoints back: what was altered in any way is found before anything of it is parsed.

The job's record holds the SHA-256 of the weights and of the manifest, the manifest that of the state. Sizes
are compared first, links and pipes are refused. The state is loaded with weights_only: nothing is unpickled.
What a mirror keeps is fetched to the disk, as many bytes as are recorded, and then read in the same way.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch

from halfstep.service.files.remote import Mirror
from halfstep.worker.training.checkpoints.writing import (
    FETCHED,
    MANIFEST_FILE,
    NAME,
    STATE_FILE,
    VERSION,
    WEIGHTS_FILE,
    CheckpointRef,
    Payload,
    sha256_of,
)
from halfstep.worker.training.errors import CheckpointDamaged, StorageFailed, TrainingFailure
from halfstep.worker.training.failures import ran_out_of_host_memory

MAX_MANIFEST_BYTES = 65_536
AGAIN_SECONDS = 2.0
"""Until a mirror that failed is asked again, within its time for a checkpoint."""


def load(ref: CheckpointRef, mirror: Mirror | None = None) -> Payload:
    """Read a checkpoint back onto the CPU after verifying every byte of it against its manifest and `ref`.

    With a mirror it is fetched from there, unless a whole one is found at its local path.

    Raises:
        CheckpointDamaged: it is missing, truncated, altered, or another one than `ref` names.
        StorageFailed: the place where it should be is not there, or may not be read: that says nothing of it.
    """
    if mirror is None:
        return _load(ref)
    if ref.path.is_dir():  # written before there was a mirror
        try:
            return _load(ref)
        except CheckpointDamaged:
            pass
    deadline = time.monotonic() + mirror.seconds
    seen = False
    while True:
        try:
            return _fetch(ref, mirror, deadline)
        except CheckpointDamaged as damage:
            damage.detail["path"] = str(ref.path)
            # What is called damaged is dropped: looked at twice, should only its transfer be at fault.
            if seen:
                raise
            seen = True
        except OSError as error:
            if time.monotonic() + AGAIN_SECONDS >= deadline:
                raise _unavailable(ref, error.strerror or str(error)) from error
            time.sleep(AGAIN_SECONDS)


def _fetch(ref: CheckpointRef, mirror: Mirror, deadline: float) -> Payload:
    ref.path.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=FETCHED, dir=ref.path.parent))
    local = replace(ref, path=directory / ref.path.name)
    local.path.mkdir()

    def fetch(name: str, limit: int) -> None:
        if not mirror.fetch(ref.path, name, local.path / name, limit=limit, deadline=deadline):
            if not mirror.is_there():
                raise _unavailable(ref, f"{mirror.name} is empty")
            raise _damaged(ref, f"has no {name} at {mirror.name}")

    try:
        fetch(MANIFEST_FILE, MAX_MANIFEST_BYTES)
        for name, (size, _) in _manifest(local)["files"].items():
            fetch(name, size)
        return _load(local)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _load(ref: CheckpointRef) -> Payload:
    if not ref.path.parent.is_dir():
        raise _unavailable(ref, f"{ref.path.parent} is not there")
    manifest = _manifest(ref)
    for name, entry in manifest["files"].items():
        _verify(ref, name, entry)
    try:
        weights = safetensors.torch.load_file(ref.path / WEIGHTS_FILE)
        content = torch.load(ref.path / STATE_FILE, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # readers of altered files raise what they happen to stumble over
        if ran_out_of_host_memory(error):  # says nothing of the files, which were found to be whole
            raise
        raise _damaged(ref, f"cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise _damaged(ref, "was written by another version")
    if content.get("step") != ref.step or content.get("fence") != manifest["fence"]:
        raise _damaged(ref, f"holds the state of step {content.get('step')} of another run")
    try:
        for alias, original in content["aliases"].items():
            weights[alias] = weights[original]
        return Payload(weights=weights, state=content["state"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(ref, f"lacks {error}") from error


def load_newest(
    refs: Sequence[CheckpointRef],
    on_damage: Callable[[CheckpointDamaged], None],
    load: Callable[[CheckpointRef], Payload] = load,
) -> tuple[CheckpointRef, Payload] | None:
    """The first of `refs` (newest first) that is whole.

    None when none is. Damage is reported, then passed over.

    Raises:
        StorageFailed: none is, and the disk answers with errors: a job must not begin again, and drop what it
            had, because a disk is ill.
    """
    ill: CheckpointDamaged | None = None
    for ref in refs:
        try:
            return ref, load(ref)
        except CheckpointDamaged as damage:
            if getattr(damage.__cause__, "errno", None) == errno.EIO:
                ill = damage
            on_damage(damage)
    if ill is not None:
        raise StorageFailed(
            f"{ill.message}, and no other checkpoint of the job could be read; look after the disk, then "
            "retry the job from a checkpoint",
            detail=ill.detail,
        ) from ill
    return None


def _manifest(ref: CheckpointRef) -> dict[str, Any]:
    try:
        with _regular(ref, MANIFEST_FILE) as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise _damaged(ref, "has no manifest, so it was never finished or has been removed") from error
    except OSError as error:
        raise _unreadable(ref, MANIFEST_FILE, error) from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise _damaged(ref, "has a manifest that is far too long")
    if ref.manifest_sha256 not in (None, hashlib.sha256(raw).hexdigest()):
        raise _damaged(ref, "has another manifest than was recorded")
    try:
        manifest = json.loads(raw)
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
        version, fence, step = manifest["version"], int(manifest["fence"]), int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(ref, f"has an unreadable manifest: {error}") from error
    if version != VERSION or set(files) != {WEIGHTS_FILE, STATE_FILE}:
        raise _damaged(ref, "was written by another version")
    name = NAME.match(ref.path.name)
    if step != ref.step or name is None or (fence, step) != (int(name.group(1)), int(name.group(2))):
        raise _damaged(ref, f"has the manifest of step {step}, fence {fence}")
    if files[WEIGHTS_FILE][1] != ref.sha256:
        raise _damaged(ref, "does not have the weights that were recorded")
    return {"fence": fence, "files": files}


def _verify(ref: CheckpointRef, name: str, entry: tuple[int, str]) -> None:
    size, sha256 = entry
    try:
        with _regular(ref, name) as file:
            # The size first: what is far too long is not read at all.
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise _damaged(ref, f"has {actual} bytes in {name} instead of {size}")
            digest = sha256_of(file)
    except OSError as error:
        raise _unreadable(ref, name, error) from error
    if digest != sha256:
        raise _damaged(ref, f"has other bytes in {name} than were written")


def _regular(ref: CheckpointRef, name: str) -> IO[bytes]:
    """Open a file of the checkpoint; neither it nor its directory may be a link to elsewhere."""
    if ref.path.is_symlink():
        raise _damaged(ref, "is a link to another place")
    # A pipe would otherwise wait for a writer, for ever.
    descriptor = os.open(ref.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _damaged(ref, f"has something else than a file in the place of {name}")
    return os.fdopen(descriptor, "rb")


def _unreadable(ref: CheckpointRef, name: str, error: OSError) -> TrainingFailure:
    # Absence, a link and a bad sector are damage of this checkpoint. All else is the place's: a permission, a
    # share that is not mounted.
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO}:
        return _damaged(ref, f"cannot be read: {name}: {error.strerror}")
    return _unavailable(ref, f"{name}: {error.strerror}")


def _unavailable(ref: CheckpointRef, what: str) -> StorageFailed:
    return StorageFailed(
        f"the checkpoint of step {ref.step} cannot be reached from this worker: {what}. Give it the "
        "directory and the permission, then retry the job from there",
        detail={"step": ref.step, "path": str(ref.path)},
    )


def _damaged(ref: CheckpointRef, what: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"the checkpoint of step {ref.step} {what}", detail={"step": ref.step, "path": str(ref.path)}
    )
