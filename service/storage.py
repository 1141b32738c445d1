"""Where jobs leave their files, as the processes without torch see it: open one, remove what is left.

Records name files by paths relative to one root. Nothing outside it is ever touched, whatever a record says.
How checkpoints are written and verified is the worker's business.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from service.errors import HalfstepError
from service.settings import Settings

MODEL_FILE = "model.safetensors"
"""Of a checkpoint's directory, what a client may download."""

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
    """The files below the data directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, path: str, name: str) -> StoredFile:
        """The file `name` in the directory `path`.

        Raises:
            FileAbsent: it is not there, or the path leads elsewhere.
        """
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
    """Where `settings` keep files."""
    return Storage(settings.data_dir)
