"""The installation of 0.1 on a database of each kind, brought to today's schema."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from halfstep.service.store.sql.schema import migrate
from tests.databases import KINDS, postgres_database
from tests.e2e.conftest import redis_url
from tests.frozen.installation import Installation, copy_rows, first_schema, unpack

__all__ = ["redis_url"]


@pytest.fixture
def installed(tmp_path: Path) -> Installation:
    return unpack(tmp_path / "data")


@pytest.fixture(params=KINDS)
def migrated_url(request: pytest.FixtureRequest, installed: Installation) -> Iterator[str]:
    if request.param == "sqlite":
        migrate(installed.database_url)
        yield installed.database_url
        return
    with postgres_database() as url:
        first_schema(url)
        copy_rows(installed.folder / "halfstep.db", url)
        migrate(url)
        yield url
