"""A Redis and a PostgreSQL of the suite's own, so that they may be killed, emptied and started again."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import redis

from tests.e2e.cluster import free_port, wait_for


class OwnRedis:
    """A server on loopback that keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            raise FileNotFoundError("redis-server: install it, or run without faults of the broker")
        self._program, self._folder, self.port = found, folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port, socket_timeout=2.0, socket_connect_timeout=2.0)
        self.start()

    def start(self) -> None:
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self._program,
                    *("--port", str(self.port)),
                    *("--bind", "127.0.0.1"),
                    *("--save", ""),
                    *("--appendonly", "no"),
                    *("--dir", str(self._folder)),
                ],
                stdout=log,
                stderr=log,
            )
        wait_for("Redis answers", self._answers, 20)

    def kill(self) -> None:
        """As a power cut: what was queued is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False


class OwnPostgres:
    """A cluster in a folder, run by this user, or by `postgres` where this user is root."""

    def __init__(self) -> None:
        self.binaries = _postgres_binaries()
        self.port = free_port()
        # Of its own, since `postgres` may not enter what another user keeps for itself.
        self._folder = Path(tempfile.mkdtemp(prefix="halfstep-postgres-"))
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def start(self) -> None:
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' "
            "-c max_connections=200"
        )
        self._run(
            "pg_ctl",
            "-D",
            self._data,
            "-l",
            str(self._folder / "log"),
            "-w",
            "-t",
            "60",
            "-o",
            options,
            "start",
        )

    def stop(self, mode: str) -> None:
        """`immediate` is a crash: the next start recovers from the log."""
        self._run("pg_ctl", "-D", self._data, "-m", mode, "-w", "-t", "60", "stop")

    def remove(self) -> None:
        """Stop it for good, and its folder with it."""
        self.stop("immediate")
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.binaries / program), *arguments],
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"{program} {arguments}: {done.stderr}")


def _postgres_binaries() -> Path:
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    if found is None:
        raise FileNotFoundError("initdb: install PostgreSQL's server, or run on SQLite")
    return Path(found).parent


def postgres_answers(port: int) -> bool:
    """True once the server takes connections."""
    try:
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def freeze(pid: int, seconds: float) -> None:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
