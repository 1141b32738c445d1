"""Jobs learn what they are given: the repository's examples among them, cut where they are long."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.speed import DtypeSpeed
from tests.training.jobs import job, run

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def example(name: str, **training: Any) -> JobSpec:
    [path] = [path for path in EXAMPLES if path.stem == name]
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["training"] |= training
    return JobSpec.model_validate(document)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_job_that_starts(path: Path, tmp_path: Path) -> None:
    outcome, recorder = run(example(path.stem), tmp_path, stop_after=1)
    assert outcome.step == 1
    assert not recorder.rows[0].nan


def test_digits_reaches_its_accuracy_in_mixed_precision(tmp_path: Path) -> None:
    _, recorder = run(example("digits"), tmp_path)
    assert recorder.rows[0].compute_dtype == "bfloat16"
    assert recorder.evaluations[-1].metrics["accuracy"] >= 0.95


def test_overflow_shows_skips_and_halvings_and_then_trains(tmp_path: Path) -> None:
    _, recorder = run(example("overflow"), tmp_path)
    rows = recorder.rows
    overflows = [row for row in rows if row.overflow]
    assert len(overflows) >= 3
    assert rows[0].overflow
    assert all(row.skipped and not row.nan for row in overflows)
    for row, following in pairwise(rows):
        assert following.scale == (row.scale / 2 if row.overflow else row.scale)
    assert recorder.evaluations[-1].metrics["accuracy"] >= 0.9
    assert any(type_ == "overflow" for type_, *_ in recorder.events)


def test_gpt_learns_text(tmp_path: Path) -> None:
    spec = job(
        model={"name": "gpt", "params": {"layers": 1, "heads": 2, "width": 32, "context": 64}},
        dataset={"name": "text", "params": {"max_bytes": 500_000, "held_out_bytes": 10_000}},
        optimizer={"name": "adamw", "params": {"lr": 0.01, "betas": [0.9, 0.95]}},
        training={"epochs": None, "max_steps": 60, "batch_size": 16, "evaluate_every_steps": 30},
    )
    _, recorder = run(spec, tmp_path)
    losses = [row.loss for row in recorder.rows]
    assert losses[0] > 5.0
    assert sum(losses[-10:]) / 10 < 3.2
    first, last = recorder.evaluations
    assert last.loss < first.loss < 4.0
    assert last.metrics["perplexity"] < first.metrics["perplexity"]


@pytest.mark.parametrize(
    ("blocks", "metric", "bound"),
    [
        (
            {"model": {"name": "cnn", "params": {"batch_norm": True}}, "dataset": {"name": "digits"}},
            "accuracy",
            0.9,
        ),
        (
            {
                "dataset": {"name": "synthetic", "params": {"task": "regression", "samples": 512}},
                "loss": {"name": "huber"},
                "optimizer": {"name": "adam", "params": {"lr": 0.01}},
            },
            "mae",
            0.5,
        ),
    ],
)
def test_other_models_and_tasks_learn(
    tmp_path: Path, blocks: dict[str, Any], metric: str, bound: float
) -> None:
    _, recorder = run(job(**blocks, training={"epochs": 4, "batch_size": 32}), tmp_path)
    value = recorder.evaluations[-1].metrics[metric]
    assert value >= bound if metric == "accuracy" else value <= bound


SLOW = {
    dtype: DtypeSpeed(matmul=matmul, convolution=convolution, matmul_gflops=1.0, convolution_gflops=1.0)
    for dtype, matmul, convolution in (("float32", 1, 1), ("bfloat16", 0.25, 2.0), ("float16", 0.01, 0.02))
}


def test_a_slow_precision_is_told_with_its_measured_cost(tmp_path: Path) -> None:
    _, recorder = run(job(precision={}), tmp_path, stop_after=1, speeds=SLOW)
    [told] = recorder.coded("slow_precision")
    assert (told["compute_dtype"], told["relative_speed"]) == ("bfloat16", 0.25)
    _, plain = run(job(), tmp_path / "fp32", stop_after=1, speeds=SLOW)
    assert plain.coded("slow_precision") == []
    run(job(precision={}), tmp_path, recorder, fence=2, speeds=SLOW)
    assert len(recorder.coded("slow_precision")) == 1  # not told again by a resume


def test_a_model_with_convolutions_goes_by_their_speed(tmp_path: Path) -> None:
    cnn = {
        "model": {"name": "cnn", "params": {"channels": [2, 2], "hidden": 4}},
        "dataset": {"name": "digits"},
    }
    _, recorder = run(job(**cnn, precision={}), tmp_path, stop_after=1, speeds=SLOW)
    assert recorder.coded("slow_precision") == []
    _, fp16 = run(
        job(**cnn, precision={"precision_level": "fp16"}), tmp_path / "fp16", stop_after=1, speeds=SLOW
    )
    assert [told["relative_speed"] for told in fp16.coded("slow_precision")] == [0.02]


def test_what_nobody_measured_is_not_warned_of(tmp_path: Path) -> None:
    _, recorder = run(job(precision={}), tmp_path, stop_after=1)
    assert recorder.coded("slow_precision") == []
