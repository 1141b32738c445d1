"""The migrated schema: the same as the tables say, on both databases, however many migrate at once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from halfstep.service.errors import ConfigurationError
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import check_current, migrate
from halfstep.service.store.tables import metadata
from tests.databases import KINDS, empty_database

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with empty_database(request.param, tmp_path) as url:
        yield url


def test_the_migrations_build_what_the_tables_say(empty_url: str) -> None:
    migrate(empty_url)
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences: Any = compare_metadata(context, metadata)
    engine.dispose()
    assert differences == []


def _unseen_by_autogenerate(url: str) -> set[tuple[str, ...]]:
    """CHECKs with their text, and indexes with the rows they hold, as the database itself renders them."""
    engine = create_engine(url)
    checks = {
        (table, str(check["name"]), str(check["sqltext"]))
        for table in metadata.tables
        for check in inspect(engine).get_check_constraints(table)
    }
    listing = (
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
        if engine.dialect.name == "sqlite"
        else "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    )
    with engine.connect() as connection:
        indexes = {tuple(row) for row in connection.execute(text(listing))}
    engine.dispose()
    return checks | {index for index in indexes if not index[0].startswith("alembic")}


def test_checks_and_partial_indexes_equal_those_of_the_tables(empty_url: str, tmp_path: Path) -> None:
    migrate(empty_url)
    kind = "sqlite" if empty_url.startswith("sqlite") else "postgresql"
    with empty_database(kind, tmp_path) as other:
        engine = create_engine(other)
        metadata.create_all(engine)
        engine.dispose()
        told = _unseen_by_autogenerate(other)
    assert _unseen_by_autogenerate(empty_url) == told
    assert len(told) > 20


def test_migrating_again_changes_nothing(empty_url: str) -> None:
    migrate(empty_url)
    migrate(empty_url)
    db = Database(empty_url)
    check_current(db)
    db.dispose()


def test_a_database_without_schema_is_refused_with_the_remedy(empty_url: str) -> None:
    db = Database(empty_url)
    with pytest.raises(ConfigurationError, match=r"empty.*halfstep migrate"):
        check_current(db)
    db.dispose()


def _number(url: str) -> int:
    """The number of this version's newest revision."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    engine.dispose()
    return int(found.partition("_")[0])


@pytest.mark.parametrize("since", ["", "_since_{newer:04}"])
def test_a_newer_schema_that_says_nothing_of_this_version_is_refused(empty_url: str, since: str) -> None:
    migrate(empty_url)
    newer = _number(empty_url) + 1
    revision = f"{newer + 1:04}" + since.format(newer=newer)
    db = Database(empty_url)
    with db.begin() as s:
        s.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    with pytest.raises(ConfigurationError, match=rf"{revision}, made by a newer halfstep"):
        check_current(db)
    with pytest.raises(ConfigurationError, match=rf"{revision}, made by a newer halfstep"):
        migrate(empty_url)
    db.dispose()


@pytest.mark.parametrize("behind", [0, 1])
def test_a_newer_schema_since_one_that_is_known_is_run_on_and_left_alone(empty_url: str, behind: int) -> None:
    migrate(empty_url)
    known = sorted(int(path.name[:4]) for path in (ROOT / "migrations" / "versions").glob("[0-9]*.py"))
    revision = f"{known[-1] + 2:04}_since_{known[-1 - behind]:04}"
    db = Database(empty_url)
    with db.begin() as s:
        s.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    check_current(db)
    migrate(empty_url)
    with db.read() as s:
        assert s.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == revision
    db.dispose()


def test_processes_that_migrate_at_once_all_succeed(empty_url: str) -> None:
    program = (
        "import sys; from halfstep.service.store.sql.schema import migrate; "
        "sys.stdin.readline(); migrate(sys.argv[1])"
    )
    command = [sys.executable, "-W", "error", "-c", program, empty_url]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
        for _ in range(4)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    assert ended == [("", 0)] * 4
    db = Database(empty_url)
    check_current(db)
    db.dispose()


def test_a_migration_that_fails_leaves_the_schema_as_it_was(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upgrade_then_fail(config: Any, revision: str) -> None:
        command.stamp(config, revision)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(command, "upgrade", upgrade_then_fail)
        with pytest.raises(RuntimeError, match="power cut"):
            migrate(empty_url)
    engine = create_engine(empty_url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()
