"""A job that asks for captured or compiled steps: what reaches the engine, what is told where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.worker.training.loop import StopRequest
from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256

COMPILED: dict[str, Any] = {"deterministic": False, "compile": "default"}


def refuse(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("no compiler for this machine")


def test_a_job_that_cannot_be_compiled_says_so_once_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = run(job(training={"deterministic": False}), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", refuse)
    outcome, recorder = run(job(training=COMPILED), tmp_path / "compiled")
    assert outcome.step == 12
    ((kind, level, message, data),) = [
        event for event in recorder.events if event[3].get("code") == "compile_unavailable"
    ]
    assert (kind, level, data["step"]) == ("warning", "warning", 0)
    assert "no compiler for this machine" in message
    assert same_numbers(recorder.rows, plain.rows)


def test_a_job_that_cannot_be_captured_says_so_once_in_its_life_and_trains(tmp_path: Path) -> None:
    spec = job(training={"capture": "auto"})
    _, plain = run(job(), tmp_path / "plain")
    recorder = Recorder()
    run(spec, tmp_path / "captured", recorder, stop_after=5, request=StopRequest.PAUSE)
    run(spec, tmp_path / "captured", recorder, fence=2)
    ((kind, level, message, data),) = [
        event for event in recorder.events if event[3].get("code") == "capture_unavailable"
    ]
    assert (kind, level, data["step"]) == ("warning", "warning", 0)
    assert "that takes a CUDA device" in message
    assert same_numbers(recorder.rows, plain.rows)
    assert weights_sha256(recorder) == weights_sha256(plain)


def test_a_compiled_job_saves_and_resumes_under_the_models_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.backends.debugging import eager

    compile_with_torch: Any = torch.compile
    asked: list[str] = []

    def traced_only(model: Any, mode: str) -> Any:
        asked.append(mode)
        return compile_with_torch(model, backend=eager)

    monkeypatch.setattr(torch, "compile", traced_only)
    _, straight = run(job(training=COMPILED), tmp_path / "straight")
    recorder = Recorder()
    spec = job(training=COMPILED)
    run(spec, tmp_path / "halves", recorder, stop_after=5, request=StopRequest.PAUSE)
    run(spec, tmp_path / "halves", recorder, fence=2)
    torch.compiler.reset()
    assert asked == ["default"] * 3
    assert recorder.coded("compile_unavailable") == []
    assert same_numbers(recorder.rows, straight.rows)
    assert weights_sha256(recorder) == weights_sha256(straight)
