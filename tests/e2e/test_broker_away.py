"""A broker that is away for good: jobs are found by the workers' own looks, at each heartbeat."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from halfstep.service.store.sql.schema import migrate
from tests.e2e.cluster import Cluster, free_port
from tests.e2e.test_installation import long_job

pytestmark = pytest.mark.e2e


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Cluster]:
    database = f"sqlite:///{tmp_path / 'halfstep.db'}"
    migrate(database)
    made = Cluster(tmp_path, database, f"redis://127.0.0.1:{free_port()}/0")
    try:
        made.start_api()
        made.start_worker("one")
        yield made
    finally:
        made.stop()


def test_without_any_broker_jobs_run_one_after_another(serving: Cluster) -> None:
    jobs = [serving.submit(long_job(20)) for _ in range(2)]
    assert [serving.wait(job_id)["state"] for job_id in jobs] == ["succeeded"] * 2
    assert "broker unreachable" in (serving.folder / "api.log").read_text()
