"""The catalogue of components that workers publish: what a spec may name, with what parameters."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.upsert import upsert
from halfstep.service.store.tables import components


@dataclass(frozen=True, slots=True)
class ComponentInfo:
    """One registered component: its JSON Schema of parameters, a line of help, and what else is known of it.

    `extra` of a dataset has `{"task": "classification" | "regression" | "language"}`.
    """

    kind: str
    name: str
    help: str
    schema: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


def publish(s: Session, infos: Iterable[ComponentInfo]) -> None:
    """Add these to the catalogue, or replace what it says of them."""
    # In one order everywhere, so that two workers that publish at once do not deadlock.
    ordered = sorted(infos, key=lambda info: (info.kind, info.name))
    for info in ordered:
        row = {
            "kind": info.kind,
            "name": info.name,
            "help": info.help,
            "schema": info.schema,
            "extra": info.extra,
            "published_at": db_now(),
        }
        s.execute(upsert(s, components, [row]))


def list_components(s: Session, kind: str | None = None) -> list[ComponentInfo]:
    """The catalogue, by kind and name."""
    query = select(
        components.c.kind, components.c.name, components.c.help, components.c.schema, components.c.extra
    ).order_by(components.c.kind, components.c.name)
    if kind is not None:
        query = query.where(components.c.kind == kind)
    return [ComponentInfo(*row) for row in s.execute(query)]


def edition(s: Session) -> tuple[Any, ...]:
    """What changes with every publication: far cheaper than the catalogue itself."""
    return tuple(s.execute(_EDITION).one())


_AT = components.c.published_at
_EDITION = select(func.count(), func.max(_AT), func.sum(_AT))


def catalogue(s: Session) -> dict[tuple[str, str], ComponentInfo]:
    """The catalogue by (kind, name)."""
    return {(info.kind, info.name): info for info in list_components(s)}
