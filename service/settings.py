"""Settings of every process, from `HALFSTEP_…` variables and `.env`; unsafe combinations are refused here.

Secrets may come from files: `HALFSTEP_DATABASE_URL_FILE` names a file whose content is the URL, and so for
each setting in `_FROM_FILE`.
"""

import os
import re
import socket
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from halfstep.service.network import is_loopback

_FROM_FILE = ("DATABASE_URL", "BROKER_URL", "BOOTSTRAP_KEY", "CHECKPOINT_URL")


class Settings(BaseSettings):
    """One immutable object per process; read once at its edge and handed inward."""

    model_config = SettingsConfigDict(
        env_prefix="HALFSTEP_",
        env_file=".env",
        env_ignore_empty=True,  # as compose files pass on what is not given
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # URLs have passwords in them
    )

    data_dir: Path = Field(
        default=Path("~/.local/share/halfstep"),
        description="SQLite file, broker socket, checkpoints, job logs.",
    )
    database_url: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data directory.")
    broker_url: str = Field(
        default="", description="redis:// URL; empty: the embedded Valkey on a socket in the data directory."
    )
    checkpoint_url: str = Field(
        default="",
        description="fsspec URL (s3://bucket/prefix) that keeps checkpoints; empty: the data directory.",
    )
    checkpoint_seconds: float = Field(
        default=300.0,
        gt=0,
        description="For storing or fetching one checkpoint at that URL; at most half of the stall limit.",
    )
    host: str = Field(default="127.0.0.1", description="Address the API binds.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port the API binds.")
    root_path: str = Field(
        default="",
        description="Path prefix under which a proxy serves the API, such as /halfstep; empty: none.",
    )
    lease_seconds: float = Field(
        default=60.0, gt=0, description="How long a job stays claimed without a heartbeat."
    )
    heartbeat_seconds: float = Field(
        default=10.0, gt=0, description="Between heartbeats; at most a third of the lease."
    )
    stall_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Without progress for this long (or 20 median steps), a job is stalled.",
    )
    no_worker_seconds: float = Field(
        default=600.0, gt=0, description="A queued job that no live worker could run for this long fails."
    )
    retention_days: float | None = Field(
        default=None, gt=0, description="Jobs that ended longer ago are deleted; none: they are kept."
    )
    events_days: float = Field(
        default=7.0,
        gt=0,
        description="How far back GET /events goes; longer where a consumer is behind, up to the limit.",
    )
    events_most_days: float = Field(
        default=30.0, gt=0, description="Events older than this leave GET /events, whoever is behind."
    )
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    worker_slots: int = Field(
        default=1, ge=1, le=64, description="Jobs at a time on a CPU worker; a GPU worker has one per device."
    )
    worker_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device that this worker offers."
    )
    worker_name: str = Field(default="", description="Shown in GET /workers; empty: the host's name.")
    worker_threads: int = Field(
        default=0, ge=0, description="torch threads of one job; 0: torch's own choice over the slots."
    )
    drain_seconds: float = Field(
        default=25.0, gt=0, description="A stopping worker's time for a last checkpoint, then SIGKILL."
    )
    component_modules: tuple[str, ...] = Field(
        default=(), description="Python modules whose import registers components."
    )
    text_roots: tuple[Path, ...] = Field(
        default=(),
        description="Directories that the `text` dataset may read; empty: the Python standard library only.",
    )
    dispatch_seconds: float = Field(
        default=1.0, gt=0, description="Between rounds of the dispatcher and reaper."
    )
    bootstrap_key: str = Field(
        default="",
        description="An API key (tk_…) that `halfstep migrate` stores, hashed, if it is not there.",
    )
    max_body_bytes: int = Field(default=1_048_576, ge=1024)

    def __init__(self, **values: object) -> None:
        for name in _FROM_FILE:
            path = os.environ.get(f"HALFSTEP_{name}_FILE")
            if path and name.lower() not in values and not os.environ.get(f"HALFSTEP_{name}"):
                try:
                    values[name.lower()] = Path(path).read_text(encoding="utf-8").strip()
                except OSError as error:
                    message = f"HALFSTEP_{name}_FILE names {path}, which cannot be read ({error.strerror})"
                    raise ValueError(message) from error
        super().__init__(**values)  # type: ignore[arg-type]  # values are validated by the base class

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().resolve()

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if not url:
            return url
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise ValueError(
                "is not a database URL; use sqlite:////path or postgresql://user:password@host/name"
            ) from error
        backend = parsed.get_backend_name()
        if backend == "postgresql":
            return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        if backend == "sqlite" and parsed.database:
            return url
        raise ValueError(
            "must be a SQLite file (sqlite:////path) or PostgreSQL (postgresql://user:password@host/name)"
        )

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, url: str) -> str:
        if url and not url.startswith(("redis://", "rediss://", "redis+socket://", "unix://")):
            raise ValueError("must be a redis://, rediss:// or unix:// URL, or empty for the embedded broker")
        return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, path: str) -> str:
        path = path.rstrip("/")
        if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
            raise ValueError(
                "HALFSTEP_ROOT_PATH must be a path such as /halfstep (letters, digits and . _ ~ -), or empty"
            )
        return path

    @field_validator("checkpoint_url")
    @classmethod
    def _one_url(cls, url: str) -> str:
        if url and ("://" not in url or "::" in url):
            raise ValueError(
                "HALFSTEP_CHECKPOINT_URL must be one URL such as s3://bucket/prefix or file:///directory, or "
                "empty for the data directory"
            )
        return url

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.heartbeat_seconds * 3 > self.lease_seconds:
            message = (
                f"HALFSTEP_HEARTBEAT_SECONDS={self.heartbeat_seconds:g} leaves no room for two missed beats "
                f"in HALFSTEP_LEASE_SECONDS={self.lease_seconds:g}; use at most a third of the lease"
            )
            raise ValueError(message)
        if self.checkpoint_url and self.checkpoint_seconds * 2 > self.stall_seconds:
            message = (
                f"HALFSTEP_CHECKPOINT_SECONDS={self.checkpoint_seconds:g} lets a slow store look like "
                f"a stalled job under HALFSTEP_STALL_SECONDS={self.stall_seconds:g}; use at most half of it"
            )
            raise ValueError(message)
        return self

    @cached_property
    def sql_url(self) -> str:
        """The database to use, with the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir / 'halfstep.db'}"

    @cached_property
    def broker_socket(self) -> Path:
        """Where the embedded broker listens. A Unix socket's path is limited to 107 bytes."""
        return self.data_dir / "broker.sock"

    @cached_property
    def celery_broker_url(self) -> str:
        """The broker to use, with the embedded default filled in."""
        return self.broker_url or f"redis+socket://{self.broker_socket}"

    @cached_property
    def shown_worker_name(self) -> str:
        """The name by which this host's worker is known."""
        return self.worker_name or socket.gethostname()

    @property
    def live_seconds(self) -> float:
        """How long after its last heartbeat a worker still counts as live."""
        return 3 * self.heartbeat_seconds

    def job_directory(self, job_id: str) -> Path:
        """Where a job's checkpoints are; all that it leaves on this disk."""
        return self.data_dir / "jobs" / job_id

    @cached_property
    def loopback_only(self) -> bool:
        """True when the API's address is reachable from this machine alone."""
        return is_loopback(self.host)
