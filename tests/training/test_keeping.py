"""Which checkpoints stay: the newest, and the best by the held-out loss."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.service.contract.metrics import Evaluation
from halfstep.worker.training import run as run_module
from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.checkpoints.writing import CheckpointRef, retained
from tests.training.jobs import Recorder, job, run, same_numbers, weights_sha256


def ref(step: int, loss: float | None) -> CheckpointRef:
    return CheckpointRef(step=step, path=Path(f"{step}"), sha256="", held_out_loss=loss)


@given(
    losses=st.lists(st.none() | st.floats(allow_nan=False), max_size=12),
    newest=st.integers(2, 5),
    best=st.booleans(),
)
def test_the_newest_stay_and_the_best_with_them(losses: list[float | None], newest: int, best: bool) -> None:
    known = [ref(100 - index, loss) for index, loss in enumerate(losses)]
    kept = retained(known, newest, best=best)
    assert kept[:newest] == known[:newest]
    assert [each for each in known if each in kept] == kept
    lowest = min((loss for loss in losses if loss is not None), default=None)
    if best and lowest is not None:
        assert lowest in [each.held_out_loss for each in kept]
        assert len(kept) <= newest + 1
    else:
        assert len(kept) <= newest


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Held-out losses by step, in the place of real ones; those not named are 9."""
    scripted: dict[int, float] = {}

    def evaluate(*_: Any, step: int, **__: Any) -> Evaluation:
        loss = scripted.get(step, 9.0)
        return Evaluation(step=step, split="held_out", loss=loss, metrics={"accuracy": 0.5}, seconds=0.0)

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    return scripted


def steps_of(recorder: Recorder) -> list[int]:
    return [each.step for each in recorder.refs]


EVERY_TWO = {"checkpoint_every_steps": 2, "evaluate_every_steps": 2}


def test_the_best_stays_until_a_better_one_comes(tmp_path: Path, losses: dict[int, float]) -> None:
    losses |= {2: 3.0, 4: 1.0, 10: 0.5}
    spec = job(training=EVERY_TWO)
    recorder = Recorder()
    run(spec, tmp_path, recorder, stop_after=9)
    assert steps_of(recorder) == [9, 8, 4]
    # The attempt that goes on knows it by the record.
    run(spec, tmp_path, recorder, stop_after=0, fence=2)
    assert steps_of(recorder) == [9, 8, 4]
    run(spec, tmp_path, recorder, fence=3)
    assert steps_of(recorder) == [12, 10]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        r.path.name for r in recorder.refs
    }
    for each in recorder.refs:
        load(each)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path, losses: dict[int, float]) -> None:
    losses |= {2: math.nan, 4: 5.0, 6: math.inf, 8: -math.inf}
    _, recorder = run(job(training=EVERY_TWO), tmp_path)
    assert steps_of(recorder) == [12, 10, 4]


def test_it_can_be_declined(tmp_path: Path, losses: dict[int, float]) -> None:
    losses |= {2: 1.0}
    _, recorder = run(job(training={**EVERY_TWO, "keep_best_checkpoint": False}), tmp_path)
    assert steps_of(recorder) == [12, 10]


@pytest.mark.parametrize("stop_after", [3, 5, 8])
def test_a_better_evaluation_is_saved_at_once_where_that_is_asked_for(
    tmp_path: Path, losses: dict[int, float], stop_after: int
) -> None:
    losses |= {2: 5.0, 4: 6.0, 6: 2.0, 8: 3.0}
    training = {"evaluate_every_steps": 2, "checkpoint_on_best": True}
    _, whole = run(job(training=training), tmp_path / "whole")
    assert [info.step for info in whole.infos] == [2, 6, 12]
    assert steps_of(whole) == [12, 6]
    _, resumed = run(job(training=training), tmp_path / "cut", stop_after=stop_after)
    run(job(training=training), tmp_path / "cut", resumed, fence=2)
    assert sorted({info.step for info in resumed.infos} - {stop_after}) == [2, 6, 12]
    assert same_numbers(resumed.rows, whole.rows)
    assert weights_sha256(resumed) == weights_sha256(whole)


def test_the_figures_of_an_evaluation_go_with_the_checkpoint_of_its_step(
    tmp_path: Path, losses: dict[int, float]
) -> None:
    losses |= {4: 1.5}
    _, recorder = run(job(training={"checkpoint_every_steps": 3, "evaluate_every_steps": 4}), tmp_path)
    by_step = {info.step: info.metrics for info in recorder.infos}
    assert (by_step[12]["held_out_loss"], by_step[12]["held_out_accuracy"]) == (9.0, 0.5)
    assert not any(name.startswith("held_out") for step in (3, 6, 9) for name in by_step[step])
