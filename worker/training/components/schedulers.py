"""Learning-rate schedulers of torch, and a warm-up into a cosine. The engine decides when they advance."""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch.optim import Optimizer, lr_scheduler

from halfstep.worker.training.components.parameters import (
    Count,
    Flag,
    Integer,
    NonNegative,
    Parameters,
    Positive,
    Real,
    Share,
)
from halfstep.worker.training.components.registry import Length, register_scheduler
from halfstep.worker.training.errors import InvalidComponent

Factor = Annotated[Real, Field(gt=0, le=1)]

_TOTAL = "Advances until the end of the schedule; null: the whole job."


class StepLrParameters(Parameters):
    """Parameters of `step_lr`."""

    step_size: Count = Field(description="Advances between two reductions.")
    gamma: Factor = Field(default=0.1, description="Factor of each reduction.")


class MultiStepParameters(Parameters):
    """Parameters of `multi_step`."""

    milestones: Annotated[tuple[Count, ...], Field(min_length=1, max_length=1000)] = Field(
        description="Advances after which the rate is reduced."
    )
    gamma: Factor = Field(default=0.1, description="Factor of each reduction.")


class ExponentialParameters(Parameters):
    """Parameters of `exponential`."""

    gamma: Factor = Field(description="Factor of each advance.")


class ConstantParameters(Parameters):
    """Parameters of `constant`."""

    factor: Factor = Field(default=1 / 3, description="Factor while it lasts.")
    total: Count = Field(default=5, description="Advances until the full rate.")


class CosineParameters(Parameters):
    """Parameters of `cosine`."""

    total: Count | None = Field(default=None, description=_TOTAL)
    min_lr: NonNegative = Field(default=0.0, description="Rate at the end.")


class CosineWarmRestartsParameters(Parameters):
    """Parameters of `cosine_warm_restarts`."""

    first: Count = Field(description="Advances until the first restart.")
    multiplier: Count = Field(default=1, description="Growth of the distance between restarts.")
    min_lr: NonNegative = Field(default=0.0, description="Rate before each restart.")


class LinearParameters(Parameters):
    """Parameters of `linear`."""

    start_factor: Factor = Field(default=1.0, description="Factor at the start.")
    end_factor: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.0, description="Factor at the end.")
    total: Count | None = Field(default=None, description=_TOTAL)


class PolynomialParameters(Parameters):
    """Parameters of `polynomial`."""

    power: Positive = Field(default=1.0, description="Power of the decay.")
    total: Count | None = Field(default=None, description=_TOTAL)


class OneCycleParameters(Parameters):
    """Parameters of `one_cycle`."""

    max_lr: Positive = Field(description="Rate at the top of the cycle.")
    total: Count | None = Field(default=None, description=_TOTAL)
    pct_start: Annotated[Real, Field(gt=0, lt=1)] = Field(
        default=0.3, description="Share of the cycle that rises."
    )
    anneal_strategy: Literal["cos", "linear"] = Field(default="cos", description="Shape of both slopes.")
    div_factor: Annotated[Real, Field(ge=1)] = Field(default=25.0, description="max_lr over the first rate.")
    final_div_factor: Annotated[Real, Field(ge=1)] = Field(
        default=1e4, description="The first rate over the last one."
    )
    three_phase: Flag = Field(default=False, description="Fall as long as it rose, then anneal.")


class CyclicParameters(Parameters):
    """Parameters of `cyclic`."""

    base_lr: Positive = Field(description="Lowest rate of a cycle.")
    max_lr: Positive = Field(description="Highest rate of a cycle.")
    step_size_up: Count = Field(
        default=2000, description="Advances of the rising half; the falling one is as long."
    )
    mode: Literal["triangular", "triangular2"] = Field(
        default="triangular", description="`triangular2` halves the height with each cycle."
    )


class WarmupCosineParameters(Parameters):
    """Parameters of `warmup_cosine`."""

    warmup: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = Field(
        description="Advances in which the rate rises to its full value."
    )
    total: Count | None = Field(default=None, description=_TOTAL)
    min_factor: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.0, description="Factor at the end.")


class ReduceOnPlateauParameters(Parameters):
    """Parameters of `reduce_on_plateau`."""

    factor: Annotated[Real, Field(gt=0, lt=1)] = Field(default=0.1, description="Factor of each reduction.")
    patience: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = Field(
        default=10, description="Evaluations without a better held-out loss that are borne."
    )
    threshold: Share = Field(default=1e-4, description="Relative improvement that counts as better.")
    cooldown: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = Field(
        default=0, description="Evaluations after a reduction that do not count."
    )
    min_lr: NonNegative = Field(default=0.0, description="The rate never falls below it.")


class WarmupCosine(lr_scheduler.LRScheduler):
    """Linear rise over `warmup` advances, half a cosine down to `min_factor` at `total`, then constant."""

    def __init__(self, optimizer: Optimizer, *, warmup: int, total: int, min_factor: float) -> None:
        self.warmup = warmup
        self.total = total
        self.min_factor = min_factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]  # torch also allows tensors here
        """The rate of each group, from the count of advances alone."""
        return [float(base) * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, advance: int) -> float:
        if advance < self.warmup:
            return (advance + 1) / (self.warmup + 1)
        progress = min(1.0, (advance - self.warmup) / max(1, self.total - self.warmup))
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * progress))


@register_scheduler("step_lr", StepLrParameters, summary="Reduce the rate every so many advances.")
def build_step_lr(p: StepLrParameters, optimizer: Optimizer, _length: Length) -> lr_scheduler.LRScheduler:
    """PyTorch's StepLR."""
    return lr_scheduler.StepLR(optimizer, step_size=p.step_size, gamma=p.gamma)


@register_scheduler("multi_step", MultiStepParameters, summary="Reduce the rate at given advances.")
def build_multi_step(
    p: MultiStepParameters, optimizer: Optimizer, _length: Length
) -> lr_scheduler.LRScheduler:
    """PyTorch's MultiStepLR."""
    return lr_scheduler.MultiStepLR(optimizer, milestones=sorted(p.milestones), gamma=p.gamma)


@register_scheduler("exponential", ExponentialParameters, summary="Multiply the rate at each advance.")
def build_exponential(
    p: ExponentialParameters, optimizer: Optimizer, _length: Length
) -> lr_scheduler.LRScheduler:
    """PyTorch's ExponentialLR."""
    return lr_scheduler.ExponentialLR(optimizer, gamma=p.gamma)


@register_scheduler("constant", ConstantParameters, summary="A smaller rate at first, then the full one.")
def build_constant(p: ConstantParameters, optimizer: Optimizer, _length: Length) -> lr_scheduler.LRScheduler:
    """PyTorch's ConstantLR."""
    return lr_scheduler.ConstantLR(optimizer, factor=p.factor, total_iters=p.total)


@register_scheduler("cosine", CosineParameters, summary="Half a cosine from the full rate down.")
def build_cosine(p: CosineParameters, optimizer: Optimizer, length: Length) -> lr_scheduler.LRScheduler:
    """PyTorch's CosineAnnealingLR."""
    total = _total("cosine", p.total, length)
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=p.min_lr)


@register_scheduler(
    "cosine_warm_restarts", CosineWarmRestartsParameters, summary="Cosines that start again at the full rate."
)
def build_cosine_warm_restarts(
    p: CosineWarmRestartsParameters, optimizer: Optimizer, _length: Length
) -> lr_scheduler.LRScheduler:
    """PyTorch's CosineAnnealingWarmRestarts."""
    return lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=p.first, T_mult=p.multiplier, eta_min=p.min_lr
    )


@register_scheduler("linear", LinearParameters, summary="A straight line from one factor to another.")
def build_linear(p: LinearParameters, optimizer: Optimizer, length: Length) -> lr_scheduler.LRScheduler:
    """PyTorch's LinearLR."""
    total = _total("linear", p.total, length)
    return lr_scheduler.LinearLR(
        optimizer, start_factor=p.start_factor, end_factor=p.end_factor, total_iters=total
    )


@register_scheduler("polynomial", PolynomialParameters, summary="A polynomial decay to zero.")
def build_polynomial(
    p: PolynomialParameters, optimizer: Optimizer, length: Length
) -> lr_scheduler.LRScheduler:
    """PyTorch's PolynomialLR."""
    total = _total("polynomial", p.total, length)
    return lr_scheduler.PolynomialLR(optimizer, total_iters=total, power=p.power)


@register_scheduler(
    "one_cycle", OneCycleParameters, summary="One rise and fall over the job; momentum stays as it is."
)
def build_one_cycle(p: OneCycleParameters, optimizer: Optimizer, length: Length) -> lr_scheduler.LRScheduler:
    """PyTorch's OneCycleLR."""
    total = _total("one_cycle", p.total, length)
    # torch raises at the first advance beyond the cycle: better said now than after hours.
    if length.total is not None and total < length.total:
        raise InvalidComponent(
            f"scheduler 'one_cycle' ends after {total} {length.unit}s, but the job has {length.total}; "
            "leave total out, or make it at least that",
            detail={"pointer": "/scheduler/params/total"},
        )
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=p.max_lr,
        total_steps=total,
        pct_start=p.pct_start,
        anneal_strategy=p.anneal_strategy,
        cycle_momentum=False,
        div_factor=p.div_factor,
        final_div_factor=p.final_div_factor,
        three_phase=p.three_phase,
    )


@register_scheduler(
    "cyclic", CyclicParameters, summary="Triangles between two rates; momentum stays as it is."
)
def build_cyclic(p: CyclicParameters, optimizer: Optimizer, _length: Length) -> lr_scheduler.LRScheduler:
    """PyTorch's CyclicLR."""
    return lr_scheduler.CyclicLR(
        optimizer,
        base_lr=p.base_lr,
        max_lr=p.max_lr,
        step_size_up=p.step_size_up,
        mode=p.mode,
        cycle_momentum=False,
    )


@register_scheduler(
    "warmup_cosine", WarmupCosineParameters, summary="A linear warm-up, then half a cosine down."
)
def build_warmup_cosine(
    p: WarmupCosineParameters, optimizer: Optimizer, length: Length
) -> lr_scheduler.LRScheduler:
    """A warm-up over `warmup` advances into a cosine that ends at `total`."""
    total = _total("warmup_cosine", p.total, length)
    if p.warmup >= total:
        raise InvalidComponent(
            f"scheduler 'warmup_cosine' warms up for {p.warmup} {length.unit}s of {total}; choose a smaller "
            "warmup",
            detail={"pointer": "/scheduler/params/warmup"},
        )
    return WarmupCosine(optimizer, warmup=p.warmup, total=total, min_factor=p.min_factor)


@register_scheduler(
    "reduce_on_plateau",
    ReduceOnPlateauParameters,
    summary="Reduce the rate when the held-out loss stops falling; judged at each evaluation.",
    needs_evaluation=True,
)
def build_reduce_on_plateau(
    p: ReduceOnPlateauParameters, optimizer: Optimizer, _length: Length
) -> lr_scheduler.LRScheduler:
    """PyTorch's ReduceLROnPlateau."""
    return lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=p.factor,
        patience=p.patience,
        threshold=p.threshold,
        cooldown=p.cooldown,
        min_lr=p.min_lr,
    )


def _total(name: str, asked: int | None, length: Length) -> int:
    total = asked if asked is not None else length.total
    if total is None:
        raise InvalidComponent(
            f"scheduler '{name}' needs an end, and nothing bounds the job's {length.unit}s: give its total, "
            "or training.epochs",
            detail={"pointer": "/scheduler/params/total"},
        )
    return total
