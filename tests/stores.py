"""A store behind fsspec that lies in a directory and fails as it is told to."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from halfstep.service.files.remote import Mirror

Fault = Callable[[str], None]


class FaultyFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec has no annotations
    """Local files under faulty://; class-wide, since fsspec makes and keeps the instances.

    What it has listed once it lists again, as libraries do, until it is told that others may have been there.

    Attributes:
        faults: by operation and number of its call (None: every one), called with the path; it may raise,
            wait, or change what is there.
        calls: operations with the names of the files they were for, in order.
    """

    protocol = "faulty"
    faults: ClassVar[dict[tuple[str, int | None], Fault]] = {}
    calls: ClassVar[list[tuple[str, str]]] = []
    _count: ClassVar[Counter[str]] = Counter()
    _listed: ClassVar[dict[tuple[str, bool], Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(str(path).removeprefix("faulty://"))
        return stripped

    @classmethod
    def meet(cls, operation: str, path: str) -> None:
        number = cls._count[operation]
        cls._count[operation] += 1
        cls.calls.append((operation, Path(path).name))
        for key in ((operation, number), (operation, None)):
            if key in cls.faults:
                cls.faults[key](path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.meet("makedirs", path)
        super().makedirs(path, exist_ok=exist_ok)

    def put_file(self, path1: str, path2: str, **options: Any) -> None:
        self.meet("put", path2)
        super().put_file(path1, path2, **options)
        self.meet("stored", path2)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.meet("open", path)
        opened = super()._open(path, mode, **options)
        read = opened.read

        def met(*length: int) -> Any:
            self.meet("read", path)
            return read(*length)

        opened.read = met
        return opened

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self.meet("ls", path)
        if (path, detail) not in self._listed:
            self._listed[path, detail] = super().ls(path, detail=detail, **options)
        return self._listed[path, detail]

    def invalidate_cache(self, path: str | None = None) -> None:
        self._listed.clear()

    def rm_file(self, path: str) -> None:
        self.meet("rm_file", path)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.meet("rm", path)
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


class Store:
    """A faulty store, and the directory that is behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"faulty://{directory}"
        self.released = threading.Event()

    @property
    def calls(self) -> list[tuple[str, str]]:
        return FaultyFileSystem.calls

    def mirror(self, root: Path, *, seconds: float = 60.0) -> Mirror:
        return Mirror(self.url, root, seconds=seconds)

    def fails(self, operation: str, number: int | None, fault: Fault | Exception) -> None:
        """From now on, at the call `number` of the operation, counted from now on; None: at every one."""

        def refuse(_path: str) -> None:
            assert isinstance(fault, Exception)
            raise fault

        FaultyFileSystem._count.clear()
        FaultyFileSystem.faults[operation, number] = refuse if isinstance(fault, Exception) else fault

    def recover(self) -> None:
        FaultyFileSystem.faults.clear()

    def hang(self, _path: str) -> None:
        """A fault: nothing comes back until the test is over or `released` is set."""
        self.released.wait()


@contextmanager
def store_in(directory: Path) -> Iterator[Store]:
    """An empty store; its hanging calls end afterwards."""
    directory.mkdir()
    made = Store(directory)
    FaultyFileSystem.faults.clear()
    FaultyFileSystem.calls.clear()
    FaultyFileSystem._count.clear()
    FaultyFileSystem._listed.clear()
    try:
        yield made
    finally:
        made.recover()
        made.released.set()


def flip(path: str) -> None:
    """A fault: one bit of what was stored is another."""
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def cut(path: str) -> None:
    """A fault: the last byte did not arrive."""
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
