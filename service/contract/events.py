"""What is told of jobs, and who did it: the key of a request, a command line, a worker, the dispatcher.

The edge says once who acts, and it is kept with every job and event that comes of the action. Rows of earlier
versions have nobody.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

EventType = Literal[
    "state", "precision", "overflow", "nan", "alert", "evaluation", "checkpoint", "worker", "warning"
]
Level = Literal["debug", "info", "warning", "error"]


class ActorKind(StrEnum):
    """What kind of hand did it."""

    KEY = "key"  # a request with an API key
    LOCAL = "local"  # a request from this machine while no key is configured
    COMMAND_LINE = "command_line"  # a command that works on the database itself
    WORKER = "worker"
    DISPATCHER = "dispatcher"


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody or something that acts.

    Attributes:
        kind: what it is.
        id: of the key; None for everything else.
        name: what people call it: the key's or the worker's name.
        tenant: whose the key is; None for what belongs to the installation.
    """

    kind: ActorKind
    id: str | None = None
    name: str | None = None
    tenant: str | None = None

    def document(self) -> dict[str, Any]:
        """The form in which it is stored and told."""
        return {"kind": str(self.kind), "id": self.id, "name": self.name, "tenant": self.tenant}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The actor of such a document."""
        return cls(
            ActorKind(document["kind"]), document.get("id"), document.get("name"), document.get("tenant")
        )
