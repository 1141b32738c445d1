"""Jobs: what each is, where it stands and how it came there; lists of them, and what would be submitted."""

from typing import Any, Literal

from pydantic import Field

from halfstep.service.contract.answers.examples import JOB, RESOLVED
from halfstep.service.contract.answers.progress import Stats
from halfstep.service.contract.answers.values import Answer, JobId, Open, Timestamp, with_example
from halfstep.service.contract.states import JobState, ReasonCode


class Reason(Answer):
    """Why a job ended other than by finishing."""

    code: Open[ReasonCode]
    message: str = Field(description="Whose fault it is, in a sentence, with the next thing to try.")
    detail: Any = Field(default=None, description="Figures and names behind the message.")


class Transition(Answer):
    """A state that a job entered."""

    state: Open[JobState]
    at: Timestamp
    reason: str | None = None


class Job(Answer):
    """A training job."""

    model_config = with_example(JOB)

    id: JobId
    name: str
    state: Open[JobState]
    is_terminal: bool
    status_reason: Reason | None = None
    spec: dict[str, Any] = Field(description="The JobSpec with its defaults filled in.")
    attempt: int = Field(ge=1)
    max_attempts: int
    priority: int
    tags: dict[str, str]
    parent_id: JobId | None = Field(default=None, description="The job that this one is a retry of.")
    from_checkpoint: int | None = Field(
        default=None, description="The step of the parent's that the retry went on from."
    )
    worker: str | None = Field(
        default=None, description="The name of the worker that holds it, or held it last."
    )
    created_at: Timestamp
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    transitions: list[Transition]
    stats: Stats


class JobPage(Answer):
    """Jobs, newest first."""

    items: list[Job]
    next_cursor: str | None = Field(default=None, description="For `cursor=`; null at the end.")


class DryRun(Answer):
    """What would be submitted."""

    model_config = with_example(RESOLVED)

    valid: Literal[True]
    warnings: list[str]
    resolved: dict[str, Any] = Field(description="The JobSpec with its defaults filled in.")
    capable_workers: int = Field(ge=0, description="Live workers that could run it.")
