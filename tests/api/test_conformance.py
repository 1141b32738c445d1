"""Requests generated from the OpenAPI document, and every answer checked against it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as budget
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema

from halfstep.service.api import create_app
from halfstep.service.api.export import render
from halfstep.service.contract.spec import JobSpec
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.fleet import components, workers
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from halfstep.service.store.tenants import keys

from .catalogue import INFOS
from .conftest import CPU, SPEC, Trainer

Served = tuple[OpenApiSchema, dict[str, str], str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The document of a server with a key, the headers it asks for, a running job and one that has ended."""
    directory = tmp_path_factory.mktemp("conformance")
    url = f"sqlite:///{directory / 'halfstep.db'}"
    migrate(url)
    database = Database(url)
    with database.begin() as session:
        components.publish(session, INFOS)
        workers.register(session, worker_id="w1", name="w", pid=1, capability=CPU, versions={}, slots=1)
        job, _ = jobs.submit(session, tenant="t", spec=JobSpec.model_validate(SPEC))
        ended, _ = jobs.submit(session, tenant="t", spec=JobSpec.model_validate(SPEC))
        jobs.request_cancel(session, ended.id, tenant="t")
        _, secret = keys.create(session, tenant="t", name="k", scopes=("admin",), expires_at=None)
    trainer = Trainer(database, directory)
    fence = trainer.claim(job.id)
    trainer.steps(job.id, fence, 1, 20, loss=float("inf"))
    trainer.checkpoint(job.id, fence, 20)
    app = create_app(
        Settings(data_dir=directory, database_url=url, broker_url="redis://127.0.0.1:1/0"), database
    )
    access = {"authorization": f"Bearer {secret}"}
    yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=access), access, job.id, ended.id
    database.dispose()


# Whether a component exists and its parameters fit is beyond what the document can say; the check of
# authentication repeats a request with the headers given here, key included (`test_access` has it).
UNFIT = [positive_data_acceptance, ignored_auth]
OPERATIONS = [(path, method) for path, methods in json.loads(render())["paths"].items() for method in methods]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_as_documented(served: Served, path: str, method: str, mode: GenerationMode) -> None:
    document, access, running, ended = served
    job_id = ended if path.endswith("/stream") else running  # the stream of a running job does not end
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and not any(operation.iter_parameters()):
        return  # there is nothing to get wrong

    @budget(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def exchange(case: schemathesis.Case[Any]) -> None:
        if mode is GenerationMode.POSITIVE and "job_id" in case.path_parameters:
            case.path_parameters["job_id"] = job_id
        case.call_and_validate(headers=access, excluded_checks=UNFIT)

    exchange()
