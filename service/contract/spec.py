"""JobSpec: what a client asks to be trained, and how; and what it asks of a retry. Frozen, validated, no I/O.

Component names and parameters are checked against the published catalogue elsewhere; here is
everything that can be known from the document alone.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints, ValidationInfo, field_validator

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.service.contract.text import ReadableText

Name = Annotated[ReadableText, StringConstraints(max_length=200)]
ComponentName = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.\-]+$")]
TagText = Annotated[ReadableText, StringConstraints(max_length=100)]
Count = Annotated[int, Strict(), Field(ge=1, le=2**53)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComponentRef(_Block):
    """A registered component by name, with its parameters."""

    name: ComponentName = Field(description="A name that `GET /components` lists for this kind.")
    params: dict[str, Any] = Field(
        default_factory=dict, description="Parameters; the component's schema says which."
    )


class SchedulerRef(ComponentRef):
    """A learning-rate scheduler and when it advances."""

    interval: Literal["epoch", "step"] = Field(
        default="epoch",
        description="`step`: after every applied step; `epoch`: after every epoch with an applied step.",
    )


class TrainingBlock(_Block):
    """How long, in what batches, and what is kept."""

    epochs: Count | None = Field(
        default=None,
        description="1 when neither epochs nor max_steps is given; unbounded with max_steps alone.",
    )
    max_steps: Count | None = Field(
        default=None,
        description="Optimizer steps, skipped ones included. With epochs: whichever comes first.",
    )
    batch_size: Annotated[int, Strict(), Field(ge=1, le=1_048_576)] = Field(
        default=32, description="Samples of one micro-batch."
    )
    gradient_accumulation_steps: Annotated[int, Strict(), Field(ge=1, le=65_536)] = Field(
        default=1, description="Micro-batches of one optimizer step."
    )
    seed: Annotated[int, Strict(), Field(ge=0, le=2**63 - 1)] = Field(
        default=0, description="Initialisation, shuffling and dropout."
    )
    checkpoint_every_steps: Count | None = Field(
        default=None, description="Steps between checkpoints; null: only at pause, drain and end."
    )
    checkpoint_every_seconds: Seconds | None = Field(
        default=None, description="Seconds between checkpoints, at a step boundary."
    )
    keep_checkpoints: Annotated[int, Strict(), Field(ge=2, le=1000)] = Field(
        default=2,
        description="How many of the newest checkpoints stay; at least 2, since one may be damaged.",
    )
    keep_best_checkpoint: Flag = Field(
        default=True,
        description="Besides the newest, keep the one with the lowest held-out loss of an evaluation at its "
        "step.",
    )
    checkpoint_on_best: Flag = Field(
        default=False,
        description="Also write a checkpoint whenever an evaluation has the lowest held-out loss so far.",
    )
    evaluate_every_steps: Count | None = Field(
        default=None, description="Steps between evaluations; null: after each epoch."
    )
    time_limit_seconds: Seconds | None = Field(
        default=None, description="Training time over all attempts, after which the job fails."
    )
    deterministic: Flag = Field(
        default=True,
        description="Refuse operations without a deterministic kernel: resumes are bit-exact.",
    )
    capture: Literal["off", "auto"] = Field(
        default="off",
        description="`auto`: record a whole step as a CUDA graph and replay it while batches keep their "
        "shape. Where that cannot be done the job trains as with `off`, and an event says why.",
    )
    compile: Literal["off", "default", "max-autotune"] = Field(
        default="off",
        description="torch.compile of the model, by its mode; not with `deterministic`. A model that cannot "
        "be compiled trains uncompiled, and an event says why.",
    )

    @field_validator("compile")
    @classmethod
    def _compiled_is_not_deterministic(cls, mode: str, info: ValidationInfo) -> str:
        if mode != "off" and info.data.get("deterministic"):
            raise ValueError(
                "must be 'off' while training.deterministic is true, its default: compiled code does not "
                "promise the same bits after a restart. Set training.deterministic to false, or leave "
                "compile out"
            )
        return mode


class ResourcesBlock(_Block):
    """What the job needs of a worker."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` runs wherever a worker is free."
    )
    gpus: Annotated[int, Strict(), Field(ge=1, le=1)] = Field(
        default=1, description="Devices of one job; this version offers 1."
    )
    min_memory_bytes: Annotated[int, Strict(), Field(ge=0, le=2**53)] | None = Field(
        default=None, description="Only workers whose device has at least this much memory run the job."
    )


class JobSpec(_Block):
    """A training job. Only `model` and `dataset` are required."""

    name: Name = Field(default="job", description="For people; need not be unique.")
    model: ComponentRef
    dataset: ComponentRef
    loss: ComponentRef | None = Field(
        default=None, description="Default: by the dataset's task (cross_entropy, mse)."
    )
    optimizer: ComponentRef = Field(default_factory=lambda: ComponentRef(name="adamw", params={"lr": 1e-3}))
    scheduler: SchedulerRef | None = None
    precision: MixedPrecisionConfig = Field(default_factory=MixedPrecisionConfig)
    training: TrainingBlock = Field(default_factory=TrainingBlock)
    resources: ResourcesBlock = Field(default_factory=ResourcesBlock)
    priority: Annotated[int, Strict(), Field(ge=-1000, le=1000)] = Field(
        default=0, description="Higher runs first."
    )
    max_attempts: Annotated[int, Strict(), Field(ge=1, le=100)] = Field(
        default=3, description="Attempts, lost workers included."
    )
    tags: dict[TagText, TagText] = Field(default_factory=dict, description="At most 32 labels to filter by.")

    @field_validator("tags")
    @classmethod
    def _few_tags(cls, tags: dict[str, str]) -> dict[str, str]:
        if len(tags) > 32:
            raise ValueError(f"has {len(tags)} entries; a job may carry 32")
        return tags

    @classmethod
    def stored(cls, document: Mapping[str, Any]) -> Self:
        """A spec that was accepted before, perhaps by a version that took names which this one refuses."""
        return cls.model_validate(document, context={"stored": True})

    @property
    def epochs(self) -> int | None:
        """Epochs to run: 1 when no length is given, None when only max_steps bounds the job."""
        if self.training.epochs is None and self.training.max_steps is None:
            return 1
        return self.training.epochs


class RetryRequest(_Block):
    """Where a retry begins."""

    from_checkpoint: Count | None = Field(
        default=None, description="Step of one of the job's checkpoints; null: from the start."
    )
