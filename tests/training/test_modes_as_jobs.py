"""Each of the five modes as a job: what it computes in, its scale, its events, and where a fault is found."""

import math
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.contract.precision import MixedPrecisionMode
from halfstep.service.contract.states import ReasonCode
from halfstep.worker.training.errors import InvalidComponent
from tests.training.jobs import Recorder, job, run

HIGH = 2.0**34
"""A loss scale under which the gradients of any step here overflow FP16."""

MODES: dict[str, dict[str, Any]] = {
    "automatic": {"mode": "automatic", "precision_level": "fp16"},
    "automatic-bf16": {"mode": "automatic", "precision_level": "bf16"},
    "manual": {"mode": "manual", "precision_level": "fp16"},
    "manual-bf16": {"mode": "manual", "precision_level": "bf16"},
    "selective": {"mode": "selective", "precision_level": "fp16", "selective_layers": ["fc1", "out"]},
    "selective-bf16": {"mode": "selective", "precision_level": "bf16", "selective_layers": ["fc1"]},
    "adaptive": {"mode": "adaptive", "precision_level": "fp16", "adaptive_threshold": 0.0},
    "adaptive-bf16": {"mode": "adaptive", "precision_level": "dynamic", "adaptive_threshold": 0.0},
    "gradient_scaling": {"mode": "gradient_scaling", "precision_level": "fp32"},
}
assert {fields["mode"] for fields in MODES.values()} == set(MixedPrecisionMode)

ADAPTIVE_PROBE = 3
"""Steps that ADAPTIVE takes in full precision before it looks at memory."""


def dtype_of(name: str) -> str:
    level = MODES[name]["precision_level"]
    return {"fp16": "float16", "fp32": "float32"}.get(level, "bfloat16")


def scale_of(name: str, initial: float = 2.0**16) -> float:
    return initial if MODES[name]["precision_level"] in {"fp16", "fp32"} else 1.0


@pytest.mark.parametrize("name", MODES)
def test_a_job_computes_in_what_its_mode_says(tmp_path: Path, name: str) -> None:
    fast = {"name": "adamw", "params": {"lr": 0.02}}
    outcome, recorder = run(job(precision=MODES[name], optimizer=fast, training={"epochs": 10}), tmp_path)
    assert (outcome.stopped, outcome.step) == (None, 40)
    probed = ADAPTIVE_PROBE if name.startswith("adaptive") else 0
    expected = ["float32"] * probed + [dtype_of(name)] * (40 - probed)
    assert [row.compute_dtype for row in recorder.rows] == expected
    assert [row.scale for row in recorder.rows] == [1.0] * probed + [scale_of(name)] * (40 - probed)
    assert not any(row.skipped for row in recorder.rows)
    assert recorder.lives[-1].current_scale == scale_of(name)
    assert recorder.lives[-1].last_overflow is None
    losses = [row.loss for row in recorder.rows]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), "it learns"


@pytest.mark.parametrize("name", ["adaptive", "adaptive-bf16"])
def test_a_change_of_precision_is_an_event(tmp_path: Path, name: str) -> None:
    _, recorder = run(job(precision=MODES[name]), tmp_path)
    [data] = recorder.coded("precision")
    assert ("precision", "warning") in [event[:2] for event in recorder.events if event[3] == data]
    assert (data["step"], data["reason"]) == (ADAPTIVE_PROBE, "memory")
    assert (data["from"], data["to"]) == ("float32", dtype_of(name))
    assert data["figures"]["peak_share"] > data["figures"]["adaptive_threshold"] == 0.0


def test_a_model_that_fits_stays_in_full_precision_and_says_so(tmp_path: Path) -> None:
    _, recorder = run(job(precision=MODES["adaptive"] | {"adaptive_threshold": 1.0}), tmp_path)
    assert {row.compute_dtype for row in recorder.rows} == {"float32"}
    [data] = recorder.coded("precision")
    assert (data["reason"], data["from"], data["to"]) == ("memory_fits", "float32", "float32")


@pytest.mark.parametrize("mode", ["adaptive", "automatic"])
def test_low_precision_that_is_unstable_is_left(tmp_path: Path, mode: str) -> None:
    """Steps 8 to 10 are nan: at the next decision step, 32, the job goes back to FP32 and says why."""
    spec = job(
        dataset={
            "name": "synthetic",
            "params": {"samples": 16 * 40, "held_out_samples": 16, "non_finite_steps": [8, 9, 10]},
        },
        precision={"mode": mode, "precision_level": "dynamic", "adaptive_threshold": 0.0},
        training={"epochs": 1},
    )
    outcome, recorder = run(spec, tmp_path)
    assert outcome.step == 40
    assert [row.step for row in recorder.rows if row.nan] == [8, 9, 10]
    begins = ADAPTIVE_PROBE if mode == "adaptive" else 0
    expected = ["float32"] * begins + ["bfloat16"] * (32 - begins) + ["float32"] * 8
    assert [row.compute_dtype for row in recorder.rows] == expected
    left = recorder.coded("precision")[-1]
    assert (left["step"], left["reason"], left["to"]) == (32, "nan", "float32")
    assert left["figures"] == {"nan_in_a_row": 3, "layer": "input"}


@pytest.mark.parametrize("name", ["automatic", "manual", "selective", "adaptive"])
def test_a_scale_that_is_too_high_is_named_halved_and_outlived(tmp_path: Path, name: str) -> None:
    precision = MODES[name] | {"initial_scale": HIGH, "max_scale": HIGH, "max_consecutive_skips": 50}
    outcome, recorder = run(job(precision=precision, training={"epochs": 15}), tmp_path)
    first = ADAPTIVE_PROBE + 1 if name == "adaptive" else 1
    lost = [row for row in recorder.rows if row.overflow]
    assert [row.step for row in lost][:10] == list(range(first, first + 10))
    assert [row.scale for row in lost] == [HIGH / 2**k for k in range(len(lost))]
    assert len(lost) < 20
    assert [row.step for row in recorder.rows if row.skipped] == [row.step for row in lost]
    assert not any(row.nan for row in recorder.rows)
    assert recorder.lives[-1].current_scale == HIGH / 2 ** len(lost)
    assert outcome.step == 60
    assert math.isfinite(recorder.evaluations[-1].loss)

    [data] = recorder.coded("overflow")
    assert (data["step"], data["layer"], data["kind"]) == (first, "out", "backward")
    # A selected layer gets its output's gradient in FP32 and loses it where it casts it: inside.
    assert data["where"] == ("grad_input" if name == "selective" else "grad_output")
    assert data["verdict"] == "precision"
    last = recorder.lives[-1].last_overflow
    assert last is not None
    assert (last["step"], last["kind"]) == (lost[-1].step, "backward")
    assert last["layer"] in {"fc1", "out"}


def test_gradient_scaling_names_the_layer_whose_weights_overflow(tmp_path: Path) -> None:
    """FP32 ends at 2^128: inputs of 1000 bring the first layer's weight gradients there, nothing else."""
    largest = 2.0**127
    spec = job(
        dataset={"name": "synthetic", "params": {"samples": 64, "input_scale": 1000.0}},
        model={"name": "mlp", "params": {"hidden": []}},
        precision=MODES["gradient_scaling"] | {"initial_scale": largest / 8, "max_scale": largest},
    )
    _, recorder = run(spec, tmp_path)
    assert recorder.rows[0].overflow
    assert recorder.rows[0].skipped
    data = recorder.coded("overflow")[0]
    assert (data["step"], data["layer"], data["kind"]) == (1, "out", "backward")
    last = recorder.lives[-1].last_overflow
    assert last is not None
    assert last["layer"] == "out"
    assert any(not row.skipped for row in recorder.rows)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", MODES)
def test_a_bad_sample_is_flagged_at_its_step_and_blamed_on_the_data(
    tmp_path: Path, name: str, value: str
) -> None:
    spec = job(
        dataset={
            "name": "synthetic",
            "params": {
                "samples": 16 * 12,
                "held_out_samples": 16,
                "non_finite_steps": [7],
                "non_finite_value": value,
            },
        },
        precision=MODES[name],
        training={"epochs": 1},
    )
    outcome, recorder = run(spec, tmp_path)
    assert outcome.step == 12
    assert [row.step for row in recorder.rows if row.nan] == [7]
    assert [row.step for row in recorder.rows if row.skipped] == [7]
    assert not any(row.overflow for row in recorder.rows)
    assert recorder.rows[-1].scale == scale_of(name), "no scale cures it, so none is lowered"
    [data] = recorder.coded("nan")
    assert (data["step"], data["layer"], data["kind"]) == (7, "input", "forward")
    assert data["verdict"] == "data_or_model"
    assert recorder.lives[-1].last_overflow is None
    assert math.isfinite(recorder.evaluations[-1].loss)


CNN_LAYERS = ["conv1", "conv2", "fc1", "fc2"]


def test_selected_layers_of_the_cnn_are_lowered(tmp_path: Path) -> None:
    blocks: dict[str, Any] = {
        "model": {"name": "cnn", "params": {"channels": [4, 4], "hidden": 8}},
        "dataset": {"name": "synthetic", "params": {"samples": 64, "features": 16, "held_out_samples": 16}},
    }
    selective = {"mode": "selective", "precision_level": "bf16", "selective_layers": CNN_LAYERS}
    _, lowered = run(job(precision=selective, **blocks), tmp_path / "selective")
    _, plain = run(job(precision={"precision_level": "fp32"}, **blocks), tmp_path / "plain")
    assert {row.compute_dtype for row in lowered.rows} == {"bfloat16"}
    assert [row for row in lowered.events if "selective_layers" in row[2]] == []
    difference = abs(lowered.rows[0].loss - plain.rows[0].loss)
    assert 0 < difference < 1e-2, "BF16's rounding, and no more"


def test_selected_layers_that_the_model_does_not_have_fail_the_job(tmp_path: Path) -> None:
    selective = {"mode": "selective", "precision_level": "bf16", "selective_layers": CNN_LAYERS}
    spec = job(model={"name": "mlp", "params": {"hidden": []}}, precision=selective)
    with pytest.raises(InvalidComponent) as failure:
        run(spec, tmp_path)
    assert failure.value.code is ReasonCode.INVALID_COMPONENT
    assert failure.value.detail == {"pointer": "/precision"}
    for name in (*CNN_LAYERS, "out"):
        assert f"'{name}'" in failure.value.message


def test_selected_layers_that_the_model_has_in_part_are_told(tmp_path: Path) -> None:
    selective = {"mode": "selective", "precision_level": "bf16", "selective_layers": CNN_LAYERS}
    recorder = Recorder()
    run(job(precision=selective), tmp_path, recorder)
    [message] = [m for type_, _, m, _ in recorder.events if type_ == "warning" and "selective_layers" in m]
    assert "no layer matches 'conv1', 'conv2', 'fc2'" in message
    assert {row.compute_dtype for row in recorder.rows} == {"bfloat16"}
