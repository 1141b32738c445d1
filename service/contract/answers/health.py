"""Whether the service answers, and what it lacks."""

from typing import Literal

from halfstep.service.contract.answers.values import Answer, Open


class Alive(Answer):
    """The process answers."""

    status: Literal["ok"]


class Part(Answer):
    """One part that requests depend on."""

    ok: bool
    detail: str | None = None


class Readiness(Answer):
    """Whether requests can be served. Without a broker jobs are still taken in: `degraded`."""

    status: Open[Literal["ready", "degraded"]]
    parts: dict[Open[Literal["database", "schema", "broker"]], Part]
