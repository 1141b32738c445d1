"""What there is to run jobs: workers with their devices, and the components that they offer."""

from typing import Any, Literal

from pydantic import Field

from halfstep.service.contract.answers.examples import COMPONENT, WORKER
from halfstep.service.contract.answers.values import Answer, Open, Timestamp, with_example
from halfstep.service.contract.components import ComponentKind
from halfstep.service.contract.speed import DtypeSpeed


class Component(Answer):
    """Something that a spec can name."""

    model_config = with_example(COMPONENT)

    kind: Open[ComponentKind]
    name: str
    help: str
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema (Draft 2020-12) of its params.")
    extra: dict[str, Any]


class ComponentList(Answer):
    """What the workers have published."""

    items: list[Component]


class Capability(Answer):
    """What a worker's device can do."""

    device_type: Open[Literal["cpu", "cuda"]]
    device_name: str
    device_count: int
    bf16: bool
    fp16: bool
    memory_bytes: int
    speed: dict[str, DtypeSpeed] | None = Field(
        default=None,
        description="By data type, as the worker measured it when it started; null: not measured.",
    )


class Worker(Answer):
    """A process that trains jobs."""

    model_config = with_example(WORKER)

    id: str
    name: str
    pid: int
    state: Open[Literal["free", "busy", "draining"]]
    slots: int
    busy: int = Field(description="Jobs that it runs now.")
    capability: Capability
    versions: dict[str, Any]
    started_at: Timestamp
    last_seen: Timestamp


class WorkerList(Answer):
    """Workers that were seen lately."""

    items: list[Worker]
