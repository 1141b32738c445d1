"""Databases for the tests that write through the store."""

from tests.databases import _migrated_file, _migrated_postgres, database, database_url

__all__ = ["_migrated_file", "_migrated_postgres", "database", "database_url"]
