"""An evaluation reads every held-out sample once and changes nothing."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from halfstep.worker.training import evaluation as module
from halfstep.worker.training.components import DataInfo, Dataset, InputKind, Task, TensorSplit
from halfstep.worker.training.evaluation import evaluate
from halfstep.worker.training.loop import StopRequest
from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256

CPU = torch.device("cpu")


class Region:
    """The engine's region, reduced to a function."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __enter__(self) -> Any:
        return self.forward

    def __exit__(self, *_: object) -> None:
        return None


def dataset(task: Task, inputs: torch.Tensor, targets: torch.Tensor, outputs: int) -> Dataset:
    info = DataInfo(task=task, inputs=InputKind.FEATURES, shape=tuple(inputs.shape[1:]), outputs=outputs)
    split = TensorSplit(inputs, targets)
    return Dataset(train=split, held_out=split, info=info)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_classification(batch_size: int) -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(10, 4), torch.randint(0, 4, (10,))
    seen: list[torch.Tensor] = []
    result = evaluate(
        dataset(Task.CLASSIFICATION, logits, classes, 4),
        functional.cross_entropy,
        Region(lambda batch: seen.append(batch) or batch),
        step=3,
        batch_size=batch_size,
        device=CPU,
    )
    assert torch.equal(torch.cat(seen), logits)
    assert result.loss == pytest.approx(functional.cross_entropy(logits, classes).item())
    assert result.metrics == {"accuracy": pytest.approx((logits.argmax(1) == classes).float().mean().item())}
    assert (result.step, result.split) == (3, "held_out")


def test_regression() -> None:
    values, targets = torch.randn(7, 2), torch.randn(7, 2)
    result = evaluate(
        dataset(Task.REGRESSION, values, targets, 2),
        functional.mse_loss,
        Region(lambda batch: batch),
        step=1,
        batch_size=3,
        device=CPU,
    )
    assert result.loss == pytest.approx(functional.mse_loss(values, targets).item())
    assert result.metrics == {"mae": pytest.approx((values - targets).abs().mean().item())}


def test_perplexity_is_of_the_likelihood_and_not_of_the_loss() -> None:
    logits, tokens = torch.randn(5, 6, 11), torch.randint(0, 11, (5, 6))
    result = evaluate(
        dataset(Task.LANGUAGE, logits, tokens, 11),
        lambda output, target: functional.cross_entropy(
            output.flatten(0, 1), target.flatten(), label_smoothing=0.5
        ),
        Region(lambda batch: batch),
        step=1,
        batch_size=2,
        device=CPU,
    )
    likelihood = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert result.metrics == {"perplexity": pytest.approx(math.exp(likelihood), rel=1e-5)}
    assert result.loss != pytest.approx(likelihood)


def test_a_diverged_model_has_an_infinite_perplexity() -> None:
    assert module._named(Task.LANGUAGE, 1e6) == {"perplexity": math.inf}


WITH_STATE = {
    "model": {"name": "mlp", "params": {"hidden": [8], "dropout": 0.5, "norm": "batch"}},
    "precision": {"precision_level": "fp16"},
}


def test_evaluating_changes_nothing_of_the_training(tmp_path: Path) -> None:
    data = {"name": "synthetic", "params": {"samples": 64, "held_out_samples": 0}}
    _, without = run(job(**WITH_STATE, dataset=data), tmp_path / "without")
    recorder = Recorder()
    split = TensorSplit(torch.randn(9, 16), torch.zeros(9, dtype=torch.int64))
    spec = job(**WITH_STATE, dataset=data, training={"evaluate_every_steps": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "halfstep.worker.training.components.datasets.synthetic.Dataset",
            lambda **kw: Dataset(**kw | {"held_out": split}),
        )
        run(spec, tmp_path / "with", recorder)
    assert [e.step for e in recorder.evaluations] == list(range(1, 13))
    assert without.evaluations == []
    assert same_numbers(recorder.rows, without.rows)
    assert weights_sha256(recorder) == weights_sha256(without)


def test_generators_and_modes_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def watched(*arguments: Any, **named: Any) -> Any:
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        result = evaluate(*arguments, **named)
        states.append(
            before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        )
        return result

    monkeypatch.setattr("halfstep.worker.training.run.evaluate", watched)
    run(job(**WITH_STATE), tmp_path)
    assert states == [True, True, True]


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, [4, 8, 12]),
        ({"evaluate_every_steps": 5}, [5, 10, 12]),
        ({"evaluate_every_steps": 6}, [6, 12]),
        ({"max_steps": 6}, [4, 6]),
        ({"epochs": None, "max_steps": 5}, [4, 5]),
    ],
)
def test_when_a_run_is_evaluated(tmp_path: Path, training: dict[str, Any], steps: list[int]) -> None:
    _, recorder = run(job(training=training), tmp_path)
    assert [evaluation.step for evaluation in recorder.evaluations] == steps


def test_a_run_that_resumes_at_an_evaluation_does_not_repeat_it(tmp_path: Path) -> None:
    _, recorder = run(job(), tmp_path, stop_after=4, request=StopRequest.PAUSE)
    run(job(), tmp_path, recorder, fence=2)
    assert [evaluation.step for evaluation in recorder.evaluations] == [4, 8, 12]


def test_a_plateau_scheduler_follows_the_evaluations(tmp_path: Path) -> None:
    spec = job(
        scheduler={"name": "reduce_on_plateau", "params": {"patience": 0, "factor": 0.5, "threshold": 0.9}},
        training={"evaluate_every_steps": 2},
    )
    _, recorder = run(spec, tmp_path)
    # No improvement is ever large enough: the rate halves at every evaluation but the first.
    assert [row.learning_rate for row in recorder.rows] == [
        1e-3 * 0.5 ** max(0, (row.step - 1) // 2 - 1) for row in recorder.rows
    ]
