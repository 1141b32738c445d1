"""What the compose files hand to each process: every setting, and the folders that its duties need."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import update

from halfstep.service.contract.states import JobState
from halfstep.service.dispatch.loop import one_round
from halfstep.service.settings import Settings
from halfstep.service.store import jobs, record
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import jobs as job_rows
from tests.store.making import LIVE, running, steps

DOCKER = Path(__file__).parents[2] / "docker"
SECRETS = {"database_url", "broker_url", "bootstrap_key"}
"""Settings that come from files alone."""
OF_THE_CONTAINER = {"data_dir", "host", "port"}
"""Settings that the files and images fix: from outside they are a volume and a published port."""
OF_WORKERS = {
    "worker_name",
    "worker_device",
    "worker_slots",
    "worker_threads",
    "drain_seconds",
    "component_modules",
    "text_roots",
}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def services(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())["services"]


COMPOSE, WORKERS = services("compose.yaml"), services("compose.workers.yaml")


def given(service: Mapping[str, Any], **variables: str) -> dict[str, str]:
    """The environment of a service's process, with these variables in docker/.env."""

    def value(found: re.Match[str]) -> str:
        return variables.get(found[1]) or (found[3] or "" if found[2] == "-" else "")

    return {name: VARIABLE.sub(value, text) for name, text in service["environment"].items()}


def settable(service: Mapping[str, Any]) -> set[str]:
    """The settings that docker/.env reaches in this service."""
    names = {name: VARIABLE.match(text) for name, text in service["environment"].items()}
    found = {name for name, variable in names.items() if variable is not None and variable[1] == name}
    return {name.removeprefix("HALFSTEP_").lower() for name in found}


@pytest.mark.parametrize(
    ("service", "unneeded"),
    [
        pytest.param(COMPOSE["migrate"], OF_WORKERS, id="migrate"),
        pytest.param(COMPOSE["api"], OF_WORKERS, id="api"),
        pytest.param(COMPOSE["dispatch"], OF_WORKERS, id="dispatch"),
        pytest.param(COMPOSE["worker"], set(), id="worker"),
        pytest.param(COMPOSE["worker-cpu"], set(), id="worker-cpu"),
        pytest.param(WORKERS["worker"], set(), id="worker on another host"),
    ],
)
def test_every_setting_can_be_given_to_each_process(service: dict[str, Any], unneeded: set[str]) -> None:
    assert settable(service) == set(Settings.model_fields) - SECRETS - OF_THE_CONTAINER - unneeded
    files = {name for name in SECRETS if f"HALFSTEP_{name.upper()}_FILE" in service["environment"]}
    assert files >= {"database_url", "broker_url"}


def test_every_variable_is_in_the_example_with_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = dict(re.findall(r"^#(HALFSTEP_\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    used = set()
    for path in DOCKER.glob("compose*.yaml"):
        used |= {found[1] for found in VARIABLE.finditer(path.read_text())}
    assert set(listed) == used
    worker = given(COMPOSE["worker"])
    for name in settable(COMPOSE["worker"]):
        with monkeypatch.context() as change:
            change.setenv(f"HALFSTEP_{name.upper()}", worker[f"HALFSTEP_{name.upper()}"])
            default = getattr(Settings(), name)
            change.setenv(f"HALFSTEP_{name.upper()}", listed[f"HALFSTEP_{name.upper()}"])
            assert getattr(Settings(), name) == default, name


def test_workers_on_other_hosts_are_set_as_on_the_first() -> None:
    first, other = COMPOSE["worker"]["environment"], WORKERS["worker"]["environment"]
    differ = {name for name in first | other if first.get(name) != other.get(name)}
    assert differ == {"HALFSTEP_WORKER_NAME"}  # which has no default there


class Host:
    """One host's volumes, as folders of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, service: str, inside: str) -> Path:
        """Where a path inside a service's container lies: in a volume, or in the container alone."""
        for volume in COMPOSE[service].get("volumes", ()):
            source, target = volume.split(":")[:2]
            if Path(inside).is_relative_to(target):
                return self._folder / source.removeprefix("./") / Path(inside).relative_to(target)
        return self._folder / "containers" / service / inside.removeprefix("/")

    def settings(self, service: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
        """What a service's process reads, with its secrets left out."""
        with monkeypatch.context() as change:
            for name, text in given(COMPOSE[service], **variables).items():
                if name.startswith("HALFSTEP_") and not name.endswith("_FILE"):
                    change.setenv(name, text)
            settings = Settings()
        return settings.model_copy(update={"data_dir": self.folder(service, str(settings.data_dir))})


def test_a_job_deleted_by_age_leaves_no_file_in_the_volumes(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    host = Host(tmp_path)
    worker = host.settings("worker", monkeypatch)
    job = running(database)
    kept = worker.job_directory(job.id) / "checkpoints" / "1-1"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_bytes(b"weights")
    path = kept.relative_to(worker.data_dir).as_posix()
    named: dict[str, Any] = {
        "path": path,
        "bytes": 7,
        "sha256": "0" * 64,
        "manifest_sha256": "0" * 64,
        "metrics": {},
    }
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 1), LIVE)
        jobs.record_checkpoint(s, job.id, job.fence, step=1, **named)
        jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)
        s.execute(update(job_rows).values(finished_at=job_rows.c.finished_at - 2 * 86_400.0))
    one_round(host.settings("dispatch", monkeypatch), database)
    assert kept.exists(), "by default jobs are kept"
    one_round(host.settings("dispatch", monkeypatch, HALFSTEP_RETENTION_DAYS="1"), database)
    assert not kept.exists()
    assert not worker.job_directory(job.id).exists()


def test_components_and_texts_of_ones_own_are_found_where_the_volumes_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("worker", "worker-cpu"):
        host = Host(DOCKER)
        settings = host.settings(name, monkeypatch, HALFSTEP_COMPONENT_MODULES='["my_models"]')
        assert settings.component_modules == ("my_models",)
        assert host.folder(name, COMPOSE[name]["environment"]["PYTHONPATH"]) == DOCKER / "components"
        assert [host.folder(name, str(root)) for root in settings.text_roots] == [DOCKER / "texts"]
    assert (DOCKER / "components").is_dir()
    assert (DOCKER / "texts").is_dir()
