"""A run that was cut anywhere and resumed is the run that was not, to the bit."""

import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halfstep.worker.training.checkpoints.writing import STATE_FILE
from halfstep.worker.training.components import InputKind, NoParameters, Task, register_model, registry
from halfstep.worker.training.loop import StopRequest
from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256

EVERYTHING = {
    "model": {"name": "mlp", "params": {"hidden": [12, 12], "dropout": 0.3, "norm": "batch"}},
    "dataset": {"name": "synthetic", "params": {"samples": 90, "held_out_samples": 12}},
    "training": {"epochs": 6, "batch_size": 8, "gradient_accumulation_steps": 3, "seed": 5},
    "scheduler": {"name": "cosine", "params": {}, "interval": "step"},
    "precision": {"precision_level": "fp16", "scale_window": 4, "initial_scale": 2.0**24},
}
"""Dropout, BatchNorm, a short last group, a scheduler, a scale that overflows and then grows: 24 steps."""


def in_pieces(spec: Any, directory: Path, cuts: list[int], request: StopRequest) -> Recorder:
    recorder = Recorder()
    done = 0
    for fence, cut in enumerate(cuts, start=1):
        # The process that resumes has other random states than the one that stopped.
        random.seed(fence)
        np.random.seed(fence)
        torch.manual_seed(fence)
        outcome, _ = run(spec, directory, recorder, stop_after=cut - done, request=request, fence=fence)
        assert (outcome.stopped, outcome.step) == (request, cut)
        done = cut
    outcome, _ = run(spec, directory, recorder, fence=len(cuts) + 1)
    assert (outcome.stopped, outcome.resumed_from) == (None, done)
    return recorder


@pytest.mark.parametrize("cuts", [[1], [2, 3], [4], [7, 13], [5, 11, 20], [23]])
def test_a_cut_run_equals_the_undisturbed_one(tmp_path: Path, cuts: list[int]) -> None:
    spec = job(**EVERYTHING)
    _, whole = run(spec, tmp_path / "whole")
    cut = in_pieces(spec, tmp_path / "cut", cuts, StopRequest.PAUSE)
    assert len(whole.rows) == whole.total_steps == 24
    assert any(row.overflow for row in whole.rows)
    assert any(later.scale > row.scale for row, later in zip(whole.rows, whole.rows[1:], strict=False))
    assert same_numbers(cut.rows, whole.rows)
    assert weights_sha256(cut) == weights_sha256(whole)
    assert [(e.step, e.loss, e.metrics) for e in cut.evaluations] == [
        (e.step, e.loss, e.metrics) for e in whole.evaluations
    ]
    assert not cut.coded("resume_not_exact")


@pytest.mark.parametrize(
    "blocks",
    [
        {"optimizer": {"name": "sgd", "params": {"lr": 0.1, "momentum": 0.9}}},
        {
            "optimizer": {"name": "rmsprop", "params": {}},
            "scheduler": {"name": "step_lr", "params": {"step_size": 1}},
        },
        {
            "optimizer": {"name": "adagrad", "params": {}},
            "scheduler": {"name": "reduce_on_plateau", "params": {"patience": 0, "factor": 0.5}},
            "training": {"evaluate_every_steps": 2},
        },
        {"scheduler": {"name": "one_cycle", "params": {"max_lr": 0.01}, "interval": "step"}},
        {"scheduler": {"name": "multi_step", "params": {"milestones": [1, 2]}}},
        {"scheduler": {"name": "warmup_cosine", "params": {"warmup": 3}, "interval": "step"}},
        {
            "scheduler": {
                "name": "cyclic",
                "params": {"base_lr": 0.001, "max_lr": 0.01, "step_size_up": 3},
                "interval": "step",
            }
        },
        {
            "model": {
                "name": "cnn",
                "params": {"channels": [2, 3], "hidden": 4, "batch_norm": True, "dropout": 0.2},
            }
        },
        {"precision": {"precision_level": "bf16"}},
        {"precision": {"mode": "gradient_scaling", "precision_level": "fp32"}},
        {"precision": {"enabled": False}},
    ],
)
def test_optimizers_schedulers_and_precisions_resume_exactly(tmp_path: Path, blocks: dict[str, Any]) -> None:
    spec = job(**blocks)
    _, whole = run(spec, tmp_path / "whole")
    cut = in_pieces(spec, tmp_path / "cut", [3, 6], StopRequest.DRAIN)
    assert same_numbers(cut.rows, whole.rows)
    assert weights_sha256(cut) == weights_sha256(whole)


LEVELS = ("fp32", "fp16", "bf16", "mixed", "dynamic")
CELLS = [
    *(("automatic", level) for level in LEVELS),
    *(("manual", level) for level in LEVELS if level != "dynamic"),
    *(("selective", level) for level in LEVELS if level != "fp32"),
    *(("adaptive", level) for level in LEVELS if level != "fp32"),
    ("gradient_scaling", "fp32"),
]
"""Every mode and level that go together."""

FRESH = {("automatic", "fp16"), ("adaptive", "dynamic")}
"""Cells whose resume is another process's; the others' is that of new objects in this one."""

SEED = 20_261


def cell_job(mode: str, level: str) -> Any:
    """48 steps, beyond the first decision of the engine, with all that has a state of its own."""
    precision: dict[str, Any] = {
        "mode": mode,
        "precision_level": level,
        "scale_window": 4,
        "initial_scale": 2.0**24,
        "max_scale": 2.0**40,
        "adaptive_threshold": 0.0,
    }
    if mode == "selective":
        precision["selective_layers"] = ["fc1", "out"]
    training = EVERYTHING["training"] | {"gradient_accumulation_steps": 2, "epochs": 8}
    return job(**EVERYTHING | {"precision": precision, "training": training})


@pytest.mark.parametrize(("mode", "level"), CELLS)
def test_every_precision_resumes_exactly_wherever_it_is_cut(tmp_path: Path, mode: str, level: str) -> None:
    spec = cell_job(mode, level)
    _, whole = run(spec, tmp_path / "whole")
    steps = len(whole.rows)
    cut = random.Random(f"{SEED} {mode} {level}").randrange(1, steps)
    print(f"seed {SEED}: {mode} {level} is cut after step {cut} of {steps}")
    outcome, recorder = run(spec, tmp_path / "cut", stop_after=cut, request=StopRequest.DRAIN)
    assert outcome.step == cut
    if (mode, level) in FRESH:
        outcome, recorder = in_another_process(spec, tmp_path / "cut", recorder)
    else:
        random.seed(cut)
        np.random.seed(cut)
        torch.manual_seed(cut)
        outcome, _ = run(spec, tmp_path / "cut", recorder, fence=2, decisions=decisions(recorder))
    assert (outcome.stopped, outcome.resumed_from) == (None, cut)
    assert same_numbers(recorder.rows, whole.rows)
    assert [row.scale for row in recorder.rows] == [row.scale for row in whole.rows]
    assert weights_sha256(recorder) == weights_sha256(whole)
    assert not recorder.coded("resume_not_exact")
    assert decisions(recorder) == decisions(whole)


def test_the_matrix_meets_what_it_is_about(tmp_path: Path) -> None:
    """Overflows, growth, and changes of precision happen in it; a matrix of calm runs would show little."""
    _, scaled = run(cell_job("automatic", "fp16"), tmp_path / "scaled")
    assert any(row.overflow for row in scaled.rows)
    assert any(later.scale > row.scale for row, later in zip(scaled.rows, scaled.rows[1:], strict=False))
    _, adaptive = run(cell_job("adaptive", "fp16"), tmp_path / "adaptive")
    assert {row.compute_dtype for row in adaptive.rows} == {"float32", "float16"}
    assert len(adaptive.rows) > 32


def decisions(recorder: Recorder) -> list[dict[str, Any]]:
    """As a worker tells them to the attempt that goes on."""
    return [
        {name: value for name, value in data.items() if name != "figures"}
        for type_, _, _, data in recorder.events
        if type_ == "precision" and "from" in data
    ]


def in_another_process(spec: Any, directory: Path, recorder: Recorder) -> tuple[Any, Recorder]:
    """The rest of the run, in a process that knows nothing but what is on disk and in the record."""
    recorder.on_steps = int  # a lambda of this process cannot travel
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_the_rest, spec, directory, recorder).result(timeout=120)


def _the_rest(spec: Any, directory: Path, recorder: Recorder) -> tuple[Any, Recorder]:
    return run(spec, directory, recorder, fence=2, decisions=decisions(recorder))


class Jittered(nn.Module):
    """A linear layer behind noise of one global generator."""

    def __init__(self, noise: Callable[[], float]) -> None:
        super().__init__()
        self.out = nn.Linear(16, 4)
        self.noise = noise

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(features * (1.0 + self.noise()) if self.training else features)


@pytest.mark.parametrize(
    "noise",
    [
        random.random,
        lambda: random.gauss(0.0, 1.0),
        lambda: float(np.random.rand()),
        lambda: float(np.random.randn()),
        lambda: float(torch.rand(())),
    ],
    ids=["python", "python's pairs", "numpy", "numpy's pairs", "torch"],
)
def test_the_generators_that_a_component_may_draw_from_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: Callable[[], float]
) -> None:
    registry.load_built_in()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register_model(
        "jittered",
        NoParameters,
        summary="Noise.",
        inputs=(InputKind.FEATURES,),
        tasks=(Task.CLASSIFICATION,),
    )(lambda _parameters, _data: Jittered(noise))
    spec = job(model={"name": "jittered"})
    _, whole = run(spec, tmp_path / "whole")
    cut = in_pieces(spec, tmp_path / "cut", [3, 6], StopRequest.DRAIN)
    assert same_numbers(cut.rows, whole.rows)
    assert weights_sha256(cut) == weights_sha256(whole)


def test_gpt_resumes_exactly(tmp_path: Path) -> None:
    spec = job(
        model={
            "name": "gpt",
            "params": {"layers": 1, "heads": 2, "width": 16, "context": 16, "dropout": 0.1},
        },
        dataset={"name": "text", "params": {"max_bytes": 4096, "held_out_bytes": 256}},
        training={"epochs": None, "max_steps": 8, "batch_size": 4, "gradient_accumulation_steps": 2},
        precision={"precision_level": "bf16"},
    )
    _, whole = run(spec, tmp_path / "whole")
    cut = in_pieces(spec, tmp_path / "cut", [5], StopRequest.DRAIN)
    assert same_numbers(cut.rows, whole.rows)
    assert weights_sha256(cut) == weights_sha256(whole)


def test_a_run_killed_between_checkpoints_repeats_the_same_steps(tmp_path: Path) -> None:
    spec = job(**EVERYTHING | {"training": EVERYTHING["training"] | {"checkpoint_every_steps": 5}})
    _, whole = run(spec, tmp_path / "whole")
    _, cut = run(spec, tmp_path / "cut", stop_after=8, request=StopRequest.CANCEL)
    assert (cut.rows[-1].step, cut.refs[0].step) == (8, 5)
    outcome, _ = run(spec, tmp_path / "cut", cut, fence=2)
    assert outcome.resumed_from == 5
    assert same_numbers(cut.rows, whole.rows)
    assert weights_sha256(cut) == weights_sha256(whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    spec = job()
    _, recorder = run(spec, tmp_path)
    rows, infos, evaluations = len(recorder.rows), len(recorder.infos), len(recorder.evaluations)
    outcome, _ = run(spec, tmp_path, recorder, fence=2)
    assert (outcome.step, outcome.resumed_from) == (12, 12)
    assert (len(recorder.rows), len(recorder.infos), len(recorder.evaluations)) == (rows, infos, evaluations)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path: Path) -> None:
    _, first = run(job(), tmp_path / "1")
    torch.manual_seed(99)
    _, second = run(job(), tmp_path / "2")
    _, other = run(job(training={"seed": 1}), tmp_path / "3")
    assert same_numbers(first.rows, second.rows)
    assert weights_sha256(first) == weights_sha256(second) != weights_sha256(other)


def test_what_a_checkpoint_does_does_not_change_the_run(tmp_path: Path) -> None:
    plain = job(**EVERYTHING)
    often = job(**EVERYTHING | {"training": EVERYTHING["training"] | {"checkpoint_every_steps": 1}})
    _, first = run(plain, tmp_path / "1")
    _, second = run(often, tmp_path / "2")
    assert len(second.infos) == 24
    assert same_numbers(first.rows, second.rows)
    assert weights_sha256(first) == weights_sha256(second)


def test_other_threads_are_told_as_not_exact(tmp_path: Path) -> None:
    spec = job()
    _, recorder = run(spec, tmp_path, stop_after=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(spec, tmp_path, recorder, fence=2)
    finally:
        torch.set_num_threads(threads)
    [told] = recorder.coded("resume_not_exact")
    assert told["differences"] == {"threads": [threads, threads + 1]}


def test_changed_data_are_told_as_not_exact(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.py").write_bytes(bytes(range(200)) * 5)
    spec = job(
        model={"name": "gpt", "params": {"layers": 1, "heads": 1, "width": 8, "context": 8}},
        dataset={"name": "text", "params": {"root": str(text), "held_out_bytes": 256}},
    )
    _, recorder = run(spec, tmp_path, stop_after=2, text_roots=(text,))
    (text / "a.py").write_bytes(bytes(reversed(range(200))) * 5)
    run(spec, tmp_path, recorder, stop_after=1, fence=2, text_roots=(text,))
    [told] = recorder.coded("resume_not_exact")
    assert list(told["differences"]) == ["data"]


def test_the_state_is_primitives_and_tensors_only(tmp_path: Path) -> None:
    _, recorder = run(job(**EVERYTHING), tmp_path, stop_after=4)
    state = torch.load(recorder.refs[0].path / STATE_FILE, weights_only=True)

    def check(value: object) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                check(key)
                check(below)
        elif isinstance(value, list | tuple):
            for below in value:
                check(below)
        else:
            assert value is None or isinstance(value, bool | int | float | str | torch.Tensor), type(value)

    check(state)
