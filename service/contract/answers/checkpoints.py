"""What a job has saved."""

from pydantic import Field

from halfstep.service.contract.answers.examples import CHECKPOINT
from halfstep.service.contract.answers.values import Answer, Number, Timestamp, with_example


class Checkpoint(Answer):
    """A saved state of a job."""

    model_config = with_example(CHECKPOINT)

    step: int = Field(ge=1, description="Optimizer steps taken before it.")
    bytes: int = Field(description="Of all its files.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the weights that `/model` serves.")
    created_at: Timestamp
    metrics: dict[str, Number] = Field(description="Figures of that moment.")


class CheckpointList(Answer):
    """What can be downloaded or retried from, newest first."""

    items: list[Checkpoint]
