"""Databases for the tests of what dispatchers do in containers."""

from tests.databases import _migrated_file, _migrated_postgres, database, database_url

__all__ = ["_migrated_file", "_migrated_postgres", "database", "database_url"]
