"""Where jobs leave their files, as the processes without torch see it: open one, remove what is left.

They lie below the data directory, or at HALFSTEP_CHECKPOINT_URL under the same relative names; those of
before it was set are still found in the data directory.

Records name files by paths relative to one root. Nothing outside it is ever touched, whatever a record says.
How checkpoints are written and verified is the worker's business.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from halfstep.service.errors import HalfstepError
from halfstep.service.files.remote import Mirror, MirrorFailed
from halfstep.service.settings import Settings

MODEL_FILE = "model.safetensors"
"""Of a checkpoint's directory, what a client may download."""

AWAY_SECONDS = 60.0
"""After a remote store has failed to remove something, until it is asked to again."""

_CHUNK = 2**20


class FileAbsent(HalfstepError):
    """The files are not where this process looks for them."""

    code = "file_absent"


class StoredFile:
    """One open file. It can be read to its end although it is removed meanwhile."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self.size = size

    def read(self, start: int, length: int) -> Iterator[bytes]:
        """`length` bytes from `start` on, in pieces; the file is closed after the last.

        Raises:
            OSError: it became shorter or unreadable meanwhile.
        """
        with self._file as file:
            file.seek(start)
            while length:
                piece = file.read(min(length, _CHUNK))
                if not piece:
                    raise OSError("the file ends before its size")
                length -= len(piece)
                yield piece

    def close(self) -> None:
        """Close a file that is not read."""
        self._file.close()


class Storage:
    """The files below the data directory, and their remote copies where there are any."""

    def __init__(self, root: Path, mirror: Mirror | None = None) -> None:
        self._root, self._mirror = root, mirror
        self._away_until = 0.0

    def open(self, path: str, name: str) -> StoredFile:
        """The file `name` in the directory `path`.

        Raises:
            FileAbsent: it is not there, or the path leads elsewhere.
            MirrorFailed: the remote store does not answer, or refuses.
        """
        try:
            return self._open_here(path, name)
        except FileAbsent as absent:
            try:
                found = self._mirror.open(path, name) if self._mirror is not None else None
            except PermissionError:
                found = None
            if found is None:
                raise absent from None
        return StoredFile(*found)

    def _open_here(self, path: str, name: str) -> StoredFile:
        place = self._inside(f"{path}/{name}")
        if place is None:
            raise FileAbsent(f"{path} is outside of the data directory")
        try:
            file = place.open("rb")
        except OSError as error:
            raise FileAbsent(f"{place}: {error.strerror}") from error
        return StoredFile(file, place.stat().st_size)

    def remove(self, path: str, *, keep: Sequence[str] = ()) -> None:
        """Remove a directory and what is in it, then the directories above it that are empty now.

        What is named in `keep` stays. Nothing happens where there is nothing: workers on other hosts keep
        theirs.

        Raises:
            OSError: the disk refused, or the path leads elsewhere.
        """
        place = self._inside(path)
        if place is None:
            raise PermissionError(f"{path} is outside of the data directory")
        kept = [inside for each in keep if (inside := self._inside(each)) is not None]
        with contextlib.suppress(FileNotFoundError):
            _clear(place, kept)
        for above in place.parents:
            if above == self._root:
                break
            try:
                above.rmdir()
            except OSError:  # not empty, or not there
                break

    def remove_job(self, job_id: str, paths: Sequence[str], *, keep: Sequence[str]) -> dict[str, OSError]:
        """Remove `paths` and what else a job has here but for `keep`; returns what could not be removed.

        Workers that share this disk keep everything of a job in one directory of its own.
        """
        failed = {}
        for path in (*paths, f"jobs/{job_id}"):
            try:
                self.remove(path, keep=keep)
            except OSError as error:
                failed[path] = error
        return failed

    def remove_remote_job(self, job_id: str, paths: Sequence[str], *, keep: Sequence[str]) -> OSError | None:
        """The same at the remote store, in one bounded call; returns why it could not be done, if so.

        A store that failed is left alone for AWAY_SECONDS: who asks has other things to do than to wait.
        """
        if self._mirror is None:
            return None
        if time.monotonic() < self._away_until:
            return MirrorFailed(f"{self._mirror.name} failed a moment ago")
        try:
            self._mirror.remove_job(job_id, paths, keep=keep)
        except OSError as error:
            self._away_until = time.monotonic() + AWAY_SECONDS
            return error
        return None

    def _inside(self, path: str) -> Path | None:
        place = (self._root / path).resolve()
        return place if place != self._root and place.is_relative_to(self._root) else None


def _clear(place: Path, kept: Sequence[Path]) -> None:
    if place in kept:
        return
    if any(each.is_relative_to(place) for each in kept):
        for below in place.iterdir():
            _clear(below, kept)
    elif place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink()


def storage(settings: Settings) -> Storage:
    """Where `settings` keep files.

    Raises:
        ConfigurationError: nothing that is installed serves HALFSTEP_CHECKPOINT_URL.
    """
    return _storage(settings.data_dir, mirror(settings))


def mirror(settings: Settings) -> Mirror | None:
    """The remote store that `settings` name; None: the data directory is all.

    Raises:
        ConfigurationError: nothing that is installed serves HALFSTEP_CHECKPOINT_URL.
    """
    if not settings.checkpoint_url:
        return None
    return _mirror(settings.checkpoint_url, settings.data_dir, settings.checkpoint_seconds)


@functools.lru_cache(maxsize=8)
def _mirror(url: str, root: Path, seconds: float) -> Mirror:
    return Mirror(url, root, seconds=seconds)


@functools.lru_cache(maxsize=8)
def _storage(root: Path, remote: Mirror | None) -> Storage:
    return Storage(root, remote)
