"""The data directory of one `halfstep up`: made private, checked, and held by one supervisor at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfstep.service.errors import ConfigurationError

LOCK_FILE = "up.lock"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold `directory` until the block ends or this process dies, whichever comes first.

    Raises:
        ConfigurationError: It cannot be made or written, or another supervisor holds it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"the data directory {directory} cannot be used ({error.strerror}); "
            "set HALFSTEP_DATA_DIR to one that can be written"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            message = (
                f"another `halfstep up` (process {holder or 'unknown'}) runs on {directory}; stop that one, "
                "or set HALFSTEP_DATA_DIR to another directory"
            )
            raise ConfigurationError(message) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)  # and with it the lock; the file stays, so that nobody locks an unlinked one
