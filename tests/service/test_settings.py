"""Settings: defaults that work alone, secrets from files, and combinations that are refused at start."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from halfstep.service.settings import Settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of a developer


def test_the_defaults_are_embedded_and_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = Settings()
    assert settings.sql_url == "sqlite:////home/somebody/.local/share/halfstep/halfstep.db"
    assert settings.celery_broker_url == "redis+socket:///home/somebody/.local/share/halfstep/broker.sock"
    assert (settings.lease_seconds, settings.heartbeat_seconds) == (60, 10)
    assert (settings.stall_seconds, settings.no_worker_seconds) == (600, 600)
    assert settings.loopback_only


def test_a_secret_comes_from_a_file_unless_the_variable_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://user:word@host/db\n")
    monkeypatch.setenv("HALFSTEP_DATABASE_URL_FILE", str(secret))
    assert Settings().sql_url == "postgresql+psycopg://user:word@host/db"
    monkeypatch.setenv("HALFSTEP_DATABASE_URL", "sqlite:////elsewhere.db")
    assert Settings().sql_url == "sqlite:////elsewhere.db"


def test_an_empty_variable_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"HALFSTEP_{name.upper()}", "")
    secret = tmp_path / "url"
    secret.write_text("redis://broker\n")
    monkeypatch.setenv("HALFSTEP_BROKER_URL_FILE", str(secret))
    empty = Settings()
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HALFSTEP_{name.upper()}")
    assert empty == Settings()
    assert empty.broker_url == "redis://broker"


def test_a_missing_secret_file_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_BROKER_URL_FILE", "/nowhere/secret")
    with pytest.raises(ValueError, match="HALFSTEP_BROKER_URL_FILE names /nowhere/secret"):
        Settings()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lease_seconds": 5, "heartbeat_seconds": 4}, "HALFSTEP_HEARTBEAT_SECONDS=4"),
        ({"database_url": "mysql://host/db"}, "must be a SQLite file"),
        ({"database_url": "sqlite://"}, "must be a SQLite file"),
        ({"database_url": "not a url"}, "is not a database URL"),
        ({"broker_url": "amqp://host"}, "must be a redis://"),
        ({"port": 70000}, "port"),
        ({"stall_seconds": 0}, "stall_seconds"),
        ({"worker_device": "tpu"}, "worker_device"),
        ({"checkpoint_url": "bucket/prefix"}, "HALFSTEP_CHECKPOINT_URL must be one URL"),
        ({"checkpoint_url": "simplecache::s3://bucket"}, "HALFSTEP_CHECKPOINT_URL must be one URL"),
        ({"checkpoint_url": "s3://b", "checkpoint_seconds": 301}, "HALFSTEP_CHECKPOINT_SECONDS=301"),
    ],
)
def test_what_cannot_work_is_refused_by_name(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Settings(**values)


@pytest.mark.parametrize("name", ["database_url", "broker_url", "checkpoint_url"])
def test_a_refusal_does_not_tell_what_is_in_a_url(name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(**{name: "nonsense:hunter2@host", "heartbeat_seconds": -1})
    assert name in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("db", False),
    ],
)
def test_loopback_is_recognised(host: str, loopback: bool) -> None:
    assert Settings(host=host).loopback_only is loopback
