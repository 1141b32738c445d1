"""Does low precision cost accuracy? Held-out figures of each precision beside FP32's, over several seeds.

Trains by the same loop as a job, in this process, one run after another; a seed decides initialisation,
order of the data and dropout, so that runs of one seed differ in precision alone. Writes JSON, and prints
the table that benchmarks/README.md keeps. `python -m benchmarks.accuracy --help` lists the options.
"""

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.report import machine
from halfstep.service.contract.metrics import Evaluation, LiveStats, StepMetrics
from halfstep.service.contract.spec import JobSpec
from halfstep.worker.training.loop import RunConfig, train

PRECISIONS: dict[str, dict[str, Any]] = {
    "FP32": {"mode": "automatic", "precision_level": "fp32"},
    "BF16": {"mode": "automatic", "precision_level": "bf16"},
    "FP16": {"mode": "automatic", "precision_level": "fp16"},
    "MANUAL BF16": {"mode": "manual", "precision_level": "bf16"},
    "SELECTIVE BF16": {"mode": "selective", "precision_level": "bf16"},
    # Threshold 0: low precision from the fourth step on, whatever the machine's memory.
    "ADAPTIVE": {"mode": "adaptive", "precision_level": "dynamic", "adaptive_threshold": 0.0},
}

WORKS: dict[str, dict[str, Any]] = {
    "digits MLP": {
        "model": {"name": "mlp", "params": {"hidden": [256, 128], "dropout": 0.1}},
        "dataset": {"name": "digits"},
        "optimizer": {"name": "adamw", "params": {"lr": 2e-3}},
        "training": {"epochs": 12, "batch_size": 32},
    },
    "digits CNN": {
        "model": {"name": "cnn"},
        "dataset": {"name": "digits"},
        "optimizer": {"name": "adamw", "params": {"lr": 2e-3}},
        "training": {"epochs": 5, "batch_size": 32},
    },
    "byte GPT": {
        "model": {"name": "gpt", "params": {"layers": 2, "heads": 4, "width": 32, "context": 32}},
        "dataset": {"name": "text", "params": {"max_bytes": 4_194_304, "held_out_bytes": 16_384}},
        "optimizer": {"name": "adamw", "params": {"lr": 3e-3}},
        "training": {"max_steps": 160, "batch_size": 16, "evaluate_every_steps": 160},
    },
}
SELECTIVE_LAYERS = {
    "digits MLP": ["fc1", "fc2"],
    "digits CNN": ["conv1", "conv2", "fc1", "fc2"],
    "byte GPT": ["blocks.*"],
}
METRIC = {"digits MLP": "accuracy", "digits CNN": "accuracy", "byte GPT": "loss"}
BASE = "FP32"


class Last:
    """Keeps the last evaluation, the skipped steps and the types computed in of one run."""

    def __init__(self) -> None:
        self.evaluation: Evaluation | None = None
        self.skipped = 0
        self.compute_dtypes: set[str] = set()

    def opened(self, *, total_steps: int | None) -> None: ...
    def resumed(self, step: int) -> None: ...
    def event(self, type: str, level: str, message: str, data: Mapping[str, Any] | None = None) -> None: ...  # noqa: A002 - the protocol's
    def checkpointed(self, info: object) -> None: ...
    def superseded(self, checkpoints: Sequence[object]) -> None: ...

    def steps(self, rows: Sequence[StepMetrics], live: LiveStats) -> None:
        del live
        self.skipped += sum(row.skipped for row in rows)
        self.compute_dtypes.update(row.compute_dtype for row in rows)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation


def one_run(work: str, precision: str, seed: int) -> dict[str, Any]:
    """Train once; returns the held-out figures, the skipped steps and the seconds."""
    document = json.loads(json.dumps(WORKS[work])) | {"precision": dict(PRECISIONS[precision])}
    document["training"]["seed"] = seed
    if document["precision"]["mode"] == "selective":
        document["precision"]["selective_layers"] = SELECTIVE_LAYERS[work]
    spec, last, began = JobSpec.model_validate(document), Last(), time.monotonic()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        train(RunConfig(spec=spec, device=device, directory=Path(folder), fence=1), last, lambda: None)
    if last.evaluation is None:
        raise RuntimeError(f"{work} in {precision} was never evaluated")
    evaluation = last.evaluation
    name = METRIC[work]
    return {
        "work": work,
        "precision": precision,
        "seed": seed,
        "metric": name,
        "value": evaluation.loss if name == "loss" else evaluation.metrics[name],
        "held_out_loss": evaluation.loss,
        "skipped": last.skipped,
        "compute_dtypes": sorted(last.compute_dtypes),
        "seconds": round(time.monotonic() - began, 2),
    }


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each cell's mean and spread, and how far it lies from FP32's.

    `inside`: the difference of the means is at most twice its standard error, sqrt((s² + s0²)/n).
    `paired`: the mean difference seed by seed, and its standard error.

    Raises:
        RuntimeError: a low-precision run gave FP32's held-out loss to the bit, so nothing was lowered.
    """
    cells = []
    by_cell: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        by_cell.setdefault((run["work"], run["precision"]), {})[run["seed"]] = run
    for (work, precision), cell in by_cell.items():
        values = [run["value"] for run in cell.values()]
        entry: dict[str, Any] = {
            "work": work,
            "precision": precision,
            "n": len(values),
            "mean": statistics.fmean(values),
            "stdev": statistics.stdev(values) if len(values) > 1 else math.nan,
            "skipped": sum(run["skipped"] for run in cell.values()),
        }
        base = by_cell.get((work, BASE), {})
        seeds = sorted(cell.keys() & base.keys())
        if precision != BASE and len(seeds) > 1:
            same = [s for s in seeds if cell[s]["held_out_loss"] == base[s]["held_out_loss"]]
            if same:
                raise RuntimeError(f"{work}, {precision}: seeds {same} are FP32's to the bit")
            theirs = [base[s]["value"] for s in seeds]
            pairs = [cell[s]["value"] - base[s]["value"] for s in seeds]
            error = math.sqrt((statistics.variance(values) + statistics.variance(theirs)) / len(seeds))
            entry |= {
                "difference": statistics.fmean(pairs),
                "standard_error": error,
                "inside": abs(statistics.fmean(pairs)) <= 2 * error,
                "paired_standard_error": statistics.stdev(pairs) / math.sqrt(len(pairs)),
            }
        cells.append(entry)
    return cells


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation of each cell, and in brackets its difference from FP32 ± standard error."""
    works = list(dict.fromkeys(cell["work"] for cell in cells))
    lines = [
        "| | " + " | ".join(f"{work}, held-out {METRIC[work]}" for work in works) + " |",
        "|---|" + "---|" * len(works),
    ]
    for precision in dict.fromkeys(cell["precision"] for cell in cells):
        row = []
        for work in works:
            found = [c for c in cells if (c["work"], c["precision"]) == (work, precision)]
            row.append(_cell(found[0]) if found else "not run")
        lines.append(f"| {precision} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any]) -> str:
    text = f"{cell['mean']:.4f} ± {cell['stdev']:.4f}"
    if "inside" in cell:
        verdict = "inside" if cell["inside"] else "**outside**"
        text += f" ({cell['difference']:+.4f} ± {cell['standard_error']:.4f}, {verdict})"
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--works", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--precisions", nargs="*", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("halfstep.worker.amp").setLevel(logging.ERROR)
    began, on = time.monotonic(), machine()
    runs = []
    for work in arguments.works:
        for precision in arguments.precisions:
            for seed in range(arguments.seeds):
                runs.append(one_run(work, precision, seed))
                print(json.dumps(runs[-1]), flush=True)
    cells = compare(runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": on, "seconds": round(time.monotonic() - began), "cells": cells, "runs": runs}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
