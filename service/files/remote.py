"""Jobs' files in a remote store: a copy, under the same relative names, of what lies below a local directory.

The only place that knows fsspec, which is imported once a URL is set. Whatever a store or its library raises
becomes `MirrorFailed`, in whose words no credentials are. Each call is made in a thread of its own and given
up when its time is over: a store that hangs costs a bounded wait. What is in the files, and in which order
they are to appear, is the callers' business.
"""

import contextlib
import errno
import hashlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self, TypeVar, cast
from urllib.parse import unquote

from halfstep.service.errors import ConfigurationError

READ_SECONDS = 30.0
REMOVE_SECONDS = 10.0
MOST_HANGING = 8
"""Calls given up whose threads have not come back; while there are so many, no further one is begun."""

_CHUNK = 2**20
_BLOCK = 4 * 2**20  # of a reader's buffer: libraries take 50 MB by default, and a server has many readers

T = TypeVar("T")
GivenUp = threading.Event


class MirrorFailed(OSError):
    """The store refused, broke off, gave back other bytes than it was given, or did not answer in time."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EREMOTEIO, message)
        self.message = message


class Mirror:
    """What lies below `root`, kept at an fsspec URL.

    Args:
        url: such as s3://bucket/prefix.
        root: the local directory whose relative names are used.
        seconds: that storing or fetching one checkpoint may take.

    Raises:
        ConfigurationError: nothing that is installed serves such a URL.
    """

    def __init__(self, url: str, root: Path, *, seconds: float) -> None:
        self.name = redacted(url)
        self.seconds = seconds
        self._root = root
        self._secrets = _secrets(url)
        self._hanging: list[threading.Thread] = []
        self._fs, self._base = _filesystem(url)

    def put(self, directory: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """Copy these files of `directory`, in this order, within `seconds`.

        Each is read back whole and compared with its size and SHA-256 before the next is begun. What was
        copied of them is removed where that fails.

        Raises:
            MirrorFailed: they are not there as they should be.
        """
        place = self._place(directory)

        def copy(given_up: GivenUp) -> None:
            self._fs.makedirs(place, exist_ok=True)
            for name, (size, sha256) in files.items():
                if given_up.is_set():
                    return
                self._fs.put_file(str(directory / name), f"{place}/{name}")
                self._compare(f"{place}/{name}", size, sha256, given_up)

        def work(given_up: GivenUp) -> None:
            try:
                copy(given_up)
            except Exception:
                with contextlib.suppress(Exception):  # a store that is full must not become fuller
                    self._remove(place)
                raise

        self._bounded("storing", self.seconds, work)

    def fetch(self, directory: Path, name: str, target: Path, *, limit: int, deadline: float) -> bool:
        """Copy a file of `directory` from the store to `target`; False where the store has none.

        Args:
            directory: the local one whose copy is meant.
            name: the file's.
            target: where it goes.
            limit: bytes after which it is broken off: a file that is too long need not be read to be refused.
            deadline: on the monotonic clock.

        Raises:
            MirrorFailed: the store does not answer, or refuses.
        """
        place = f"{self._place(directory)}/{name}"

        def work(given_up: GivenUp) -> bool:
            try:
                source = self._fs.open(place, "rb", block_size=_BLOCK)
            except (FileNotFoundError, IsADirectoryError):
                return False
            with source, target.open("wb") as file:
                while file.tell() <= limit and not given_up.is_set() and (piece := source.read(_CHUNK)):
                    file.write(piece)
            return True

        return self._bounded("reading", deadline - time.monotonic(), work)

    def open(self, path: str, name: str) -> tuple[IO[bytes], int] | None:
        """A file in the directory `path`, a relative one, and its size; None where the store has none.

        Raises:
            MirrorFailed: the store does not answer, or refuses.
        """
        place = f"{self._inside(path)}/{name}"

        def work(_: GivenUp) -> tuple[Any, int] | None:
            self._fs.invalidate_cache()
            try:
                size = int(self._fs.info(place)["size"])
                return self._fs.open(place, "rb", block_size=_BLOCK), size
            except FileNotFoundError:
                return None

        found = self._bounded("reading", READ_SECONDS, work)
        return None if found is None else (cast("IO[bytes]", _Reader(found[0], self._bounded)), found[1])

    def is_there(self) -> bool:
        """Whether anything is at the URL: a wrong bucket or a share that is not mounted is empty.

        Raises:
            MirrorFailed: the store does not answer, or refuses.
        """
        return bool(self._bounded("listing", READ_SECONDS, lambda _: self._list(self._base)))

    def names(self, directory: Path) -> list[str]:
        """Of what the store has in the copy of `directory`.

        Raises:
            MirrorFailed: the store does not answer, or refuses.
        """
        place = self._place(directory)
        return self._bounded("listing", REMOVE_SECONDS, lambda _: self._list(place))

    def remove(self, directory: Path, *, first: str) -> None:
        """Remove the copy of `directory`, the file `first` before the others. Nothing happens without one.

        Raises:
            MirrorFailed: the store does not answer, or refuses.
        """
        place = self._place(directory)

        def work(given_up: GivenUp) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{place}/{first}")
            if not given_up.is_set():
                self._remove(place)

        self._bounded("removing", REMOVE_SECONDS, work)

    def remove_job(self, job_id: str, paths: Sequence[str], *, keep: Collection[str]) -> None:
        """Remove `paths`, relative ones, and what else the job has here, but for `keep`.

        Raises:
            MirrorFailed: the store does not answer, or refuses.
        """
        going = [self._inside(path) for path in paths if path not in keep]
        kept = tuple(f"{self._inside(path)}/" for path in keep)
        own = self._inside(f"jobs/{job_id}")

        def work(given_up: GivenUp) -> None:
            for place in going:
                if not given_up.is_set():
                    self._remove(place)
            if not any(place.startswith(f"{own}/") for place in kept):
                self._remove(own)
                return
            self._fs.invalidate_cache()
            for place in self._fs.find(own):
                if not given_up.is_set() and not place.startswith(kept):
                    self._fs.rm_file(place)

        self._bounded("removing", REMOVE_SECONDS, work)

    def _place(self, path: Path) -> str:
        return self._inside(path.relative_to(self._root).as_posix())

    def _inside(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise PermissionError(errno.EACCES, f"it is outside of {self.name}", path)
        return "/".join((self._base, *parts))

    def _list(self, place: str) -> list[str]:
        # Others write there too: what a library remembers of a listing is of no use.
        self._fs.invalidate_cache()
        try:
            return [PurePosixPath(found).name for found in self._fs.ls(place, detail=False)]
        except FileNotFoundError:
            return []

    def _remove(self, place: str) -> None:
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(place, recursive=True)

    def _compare(self, place: str, size: int, sha256: str, given_up: GivenUp) -> None:
        digest, length = hashlib.sha256(), 0
        with self._fs.open(place, "rb", block_size=_BLOCK) as file:
            while not given_up.is_set() and (piece := file.read(_CHUNK)):
                digest.update(piece)
                length += len(piece)
        if (length, digest.hexdigest()) != (size, sha256):
            name = PurePosixPath(place).name
            raise MirrorFailed(
                f"{name} came back with {length} bytes of {size}"
                if length != size
                else f"{name} came back with other bytes than were sent"
            )

    def _bounded(self, what: str, seconds: float, work: Callable[[GivenUp], T]) -> T:
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= MOST_HANGING:
            raise self._failed(what, f"{len(self._hanging)} earlier calls have not come back")
        result: Future[T] = Future()
        given_up = GivenUp()

        def run() -> None:
            try:
                result.set_result(work(given_up))
            except BaseException as error:  # noqa: BLE001 - told to who waits
                result.set_exception(error)

        thread = threading.Thread(target=run, name="mirror", daemon=True)
        thread.start()
        try:
            return result.result(timeout=max(0.0, seconds))
        except MirrorFailed as error:
            raise self._failed(what, error.message) from None
        # Without their cause: what a library says of itself may have credentials in it, and is logged.
        except Exception as error:  # noqa: BLE001 - stores raise what their libraries happen to raise
            if result.done():
                raise self._failed(what, f"{type(error).__name__}: {error}") from None
        given_up.set()
        self._hanging.append(thread)
        raise self._failed(what, f"no end within {max(0.0, seconds):g} s")

    def _failed(self, what: str, why: str) -> MirrorFailed:
        for secret in self._secrets:
            why = why.replace(secret, "***")
        return MirrorFailed(f"{what} at {self.name} failed: {why}")


class _Reader:
    """A file of the store, each of whose calls is bounded."""

    def __init__(self, file: Any, bounded: Callable[..., Any]) -> None:
        self._file, self._bounded = file, bounded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seek(self, place: int) -> int:
        return int(self._file.seek(place))  # moves a number, asks nobody

    def read(self, size: int) -> bytes:
        return bytes(self._bounded("reading", READ_SECONDS, lambda _: self._file.read(size)))

    def close(self) -> None:
        self._file.close()


def redacted(url: str) -> str:
    """The URL without a user, a password, or a query."""
    protocol, _, rest = url.partition("://")
    rest, query, _ = rest.partition("?")
    user, at, place = rest.rpartition("@")
    return f"{protocol}://{'***@' if user and at else ''}{place}{'?***' if query else ''}"


def _secrets(url: str) -> list[str]:
    """What must not be told, the longest first."""
    rest, _, query = url.partition("://")[2].partition("?")
    user, _, _ = rest.rpartition("@")
    password = user.partition(":")[2]
    found = {url, user, password, unquote(password), query, unquote(query)}
    return sorted((each for each in found if each), key=len, reverse=True)


def _filesystem(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - needed where a URL is set alone
    except ImportError:
        raise ConfigurationError(
            "HALFSTEP_CHECKPOINT_URL needs fsspec: pip install 'halfstep[remote]', and the library of the "
            "URL's protocol, such as s3fs or gcsfs"
        ) from None
    try:
        filesystem, base = url_to_fs(url)
    except ImportError as error:
        raise ConfigurationError(
            f"HALFSTEP_CHECKPOINT_URL={redacted(url)}: the library for {protocol}:// is not installed "
            f"({error}); install it wherever a worker, the API or the dispatcher runs"
        ) from None
    except Exception as error:  # noqa: BLE001 - a library refuses a URL in its own way
        why = str(error)
        for secret in _secrets(url):
            why = why.replace(secret, "***")
        raise ConfigurationError(
            f"HALFSTEP_CHECKPOINT_URL={redacted(url)} cannot be used: {why}; use a URL that fsspec knows, "
            "such as s3://bucket/prefix, gs://bucket/prefix or file:///directory, or leave it empty for the "
            "data directory"
        ) from None
    return filesystem, str(base).rstrip("/")
