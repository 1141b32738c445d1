"""The plots of docs/precision.md, made from runs of this code: `python -m benchmarks.plots [NAME …]`.

Needs matplotlib, which the package itself does not: `pip install matplotlib`. Every run is a job or a loop
over the library on a CPU, seeded, so that a plot can be made again.
"""

import argparse
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.service.contract.metrics import LiveStats, StepMetrics
from halfstep.service.contract.spec import JobSpec
from halfstep.worker.amp import MixedPrecisionConfig, MixedPrecisionTrainer
from halfstep.worker.amp.record.rows import StepRow
from halfstep.worker.training.errors import NonFinite
from halfstep.worker.training.loop import RunConfig, train

try:
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}: pip install matplotlib") from missing

FOLDER = Path(__file__).parents[1] / "docs" / "plots"
BLUE, RED, ORANGE, GREY = "#2563a8", "#c22f2f", "#d98200", "#777777"


class Rows:
    """Keeps the step record of one run."""

    def __init__(self) -> None:
        self.rows: list[StepMetrics] = []

    def opened(self, *, total_steps: int | None) -> None: ...
    def resumed(self, step: int) -> None: ...
    def event(self, type: str, level: str, message: str, data: Mapping[str, Any] | None = None) -> None: ...  # noqa: A002 - the protocol's
    def evaluated(self, evaluation: object) -> None: ...
    def checkpointed(self, info: object) -> None: ...
    def superseded(self, checkpoints: Sequence[object]) -> None: ...

    def steps(self, rows: Sequence[StepMetrics], live: LiveStats) -> None:
        del live
        self.rows += rows


def job(steps: int, precision: dict[str, Any], **blocks: Any) -> list[StepMetrics]:
    """The step record of a job in FP16, by default a small network on digits; one that fails ends there."""
    spec = JobSpec.model_validate(
        {
            "model": {"name": "mlp", "params": {"hidden": [64, 32]}},
            "dataset": {"name": "digits"},
            "optimizer": {"name": "adamw", "params": {"lr": 2e-3}},
            "precision": {"precision_level": "fp16"} | precision,
            "training": {"max_steps": steps, "batch_size": 32, "evaluate_every_steps": steps},
        }
        | blocks
    )
    observer = Rows()
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(RunConfig(spec=spec, device="cpu", directory=Path(folder), fence=1), observer, lambda: None)
        except NonFinite as failure:
            print("the run ended:", failure)
    return observer.rows


def draw_scale(axes: Axes, rows: Sequence[StepMetrics], *, label: str | None = None) -> None:
    """The scale of each step on a logarithmic axis, with a mark at each step that was lost."""
    axes.step([r.step for r in rows], [r.scale for r in rows], where="post", color=BLUE, lw=1.4, label=label)
    axes.set_yscale("log", base=2)
    axes.set_ylabel("loss scale")
    for name, colour, marker in (("overflow", RED, "v"), ("nan", ORANGE, "x")):
        lost = [r for r in rows if getattr(r, name)]
        if lost:
            axes.plot(
                [r.step for r in lost],
                [r.scale for r in lost],
                marker,
                color=colour,
                ms=5,
                label=f"{name} ({len(lost)} of {len(rows)} steps)",
            )
    axes.legend(loc="best", fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def draw_loss(axes: Axes, rows: Sequence[StepMetrics]) -> None:
    """The loss of each step where it is finite, on a logarithmic axis."""
    finite = [r for r in rows if math.isfinite(r.loss)]
    axes.plot([r.step for r in finite], [r.loss for r in finite], color=GREY, lw=0.9)
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def two_panels(rows: Sequence[StepMetrics], title: str) -> None:
    """Scale above, loss below."""
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 3.8), height_ratios=[3, 2], layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    draw_scale(above, rows)
    draw_loss(below, rows)


def healthy() -> None:
    """FP16 with a window of 200, without a budget: it grows, overflows at each attempt, and goes on."""
    rows = job(3000, {"scale_window": 200, "overflow_threshold": 0.01, "max_scale": 2.0**40})
    two_panels(
        rows, "Healthy: the scale grows to where gradients overflow, loses a step, backs off, tries again"
    )


def too_high() -> None:
    """The largest scale allowed at the start: a step lost for each halving, then none."""
    rows = job(120, {"initial_scale": 2.0**40, "max_scale": 2.0**40, "max_consecutive_skips": 50})
    two_panels(rows, "Initial scale far too high: one lost step per halving, then training")


def diverging() -> None:
    """A linear model under SGD with a rate that makes its weights explode, unclipped."""
    rows = job(
        140,
        {"min_scale": 2.0**-20, "max_grad_norm": None, "max_consecutive_skips": 1000},
        model={"name": "mlp", "params": {"hidden": []}},
        dataset={"name": "synthetic", "params": {"task": "regression", "samples": 4096}},
        optimizer={"name": "sgd", "params": {"lr": 3.2}},
    )
    two_panels(rows, "Diverging: the scale falls while gradients grow; a nan leaves it where it is")


def budget() -> None:
    """The same job under torch's rule and under a budget."""
    precision = {"scale_window": 50, "max_scale": 2.0**40, "underflow_handling": False}
    by_rule = {
        "overflow_threshold 0.02 = 1/scale_window: torch's rule": 0.02,
        "overflow_threshold 0.001: a refuted growth waits 1000 steps": 0.001,
    }
    figure, panels = plt.subplots(2, 1, sharex=True, figsize=(7, 4.2), layout="constrained")
    figure.suptitle("The same job under two overflow budgets, scale_window 50", fontsize=10)
    for axes, (title, threshold) in zip(panels, by_rule.items(), strict=True):
        draw_scale(axes, job(4000, precision | {"overflow_threshold": threshold}))
        axes.set_title(title, fontsize=9)
    panels[-1].set_xlabel("step")


def underflow() -> None:
    """One batch, one network, static scales: the estimate, what it estimates, and the whole FP16 error."""
    exponents = range(-16, 17, 2)
    exact, _ = gradient(None)
    estimates, totals, flushed = [], [], []
    for exponent in exponents:
        found, row = gradient(2.0**exponent)
        estimates.append(row.underflow_estimate)
        totals.append(float((found - exact).norm() / exact.norm()))
        flushed.append(float(((found == 0) & (exact != 0)).float().mean()))
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    figure.suptitle(
        "Lowering the scale: the estimate rises; the whole error only where FP16 runs out", fontsize=10
    )
    scales = [2.0**e for e in exponents]
    axes.plot(scales, estimates, "o-", color=BLUE, ms=3, label="underflow_estimate")
    axes.plot(scales, totals, "s-", color=RED, ms=3, label="relative error of the FP16 gradient")
    axes.plot(
        scales,
        [max(f, 1e-9) for f in flushed],
        "^-",
        color=GREY,
        ms=3,
        label="share of elements flushed to 0",
    )
    axes.axhline(1e-6, color=BLUE, lw=0.8, ls=":", label="underflow_threshold 1e-6")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 2)
    axes.set_xlabel("loss scale")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def gradient(scale: float | None) -> tuple[torch.Tensor, StepRow]:
    """The unscaled gradient of one fixed step in FP16 at a static scale (None: in FP32), and its row."""
    fields: dict[str, Any] = {"precision_level": "fp32"}
    if scale is not None:
        fields = {"precision_level": "fp16", "dynamic_loss_scaling": False, "initial_scale": scale}
        fields["min_scale"] = min(scale, 1.0)
    config = MixedPrecisionConfig(max_grad_norm=None, memory_efficiency=False, **fields)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    trainer, rows = MixedPrecisionTrainer(config), list[StepRow]()
    trainer.on_step = rows.extend
    trainer.setup_training(model, torch.optim.SGD(model.parameters(), lr=0.0), nn.CrossEntropyLoss())
    trainer.train_step(torch.randn(32, 64), torch.randint(0, 10, (32,)))
    trainer.flush()
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([g.flatten() for g in gradients if g is not None]).double(), rows[0]


PLOTS: dict[str, Callable[[], None]] = {
    "healthy": healthy,
    "too-high": too_high,
    "diverging": diverging,
    "budget": budget,
    "underflow": underflow,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PLOTS), metavar="NAME", help=", ".join(PLOTS))
    names = parser.parse_args().names
    torch.set_num_threads(1)
    logging.getLogger("halfstep.worker.amp").setLevel(logging.ERROR)
    mpl.use("Agg")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        PLOTS[name]()
        plt.savefig(FOLDER / f"{name}.png", dpi=90)
        plt.close("all")
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
