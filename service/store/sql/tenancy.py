"""Whose rows a query sees."""

from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select

Q = TypeVar("Q", bound=Select[Any])


def of_tenant(query: Q, column: ColumnElement[str], tenant: str | None) -> Q:
    """The query narrowed to the rows of `tenant`, which `column` names; None sees every tenant's."""
    return query if tenant is None else query.where(column == tenant)
