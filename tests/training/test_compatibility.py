"""What does not fit together is said before the first step, with both names and the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.service.contract.precision import DeviceCapability
from halfstep.worker.training.components import (
    DataInfo,
    InputKind,
    NoParameters,
    Task,
    register_dataset,
    register_loss,
    register_model,
    registry,
)
from halfstep.worker.training.errors import ComponentFailed, DataError, InvalidComponent, TrainingFailure
from tests.training.jobs import Recorder, job, run

GPT = {"name": "gpt", "params": {"layers": 1, "heads": 1, "width": 8, "context": 8}}
REGRESSION = {"name": "synthetic", "params": {"task": "regression", "samples": 64}}


@pytest.mark.parametrize(
    ("blocks", "words", "pointer"),
    [
        ({"model": GPT}, ["'gpt' takes tokens", "'synthetic' gives features", "mlp"], "/model/name"),
        (
            {"model": {"name": "mlp"}, "dataset": {"name": "text"}},
            ["'mlp' takes features", "'text' gives tokens", "gpt"],
            "/model/name",
        ),
        (
            {"model": {"name": "cnn"}, "dataset": {"name": "synthetic", "params": {"features": 15}}},
            ["'cnn' takes image", "gives features of shape [15]"],
            "/model/name",
        ),
        (
            {"loss": {"name": "mse"}},
            ["loss 'mse' is for regression", "'synthetic' is for classification", "cross_entropy"],
            "/loss/name",
        ),
        (
            {"dataset": REGRESSION, "loss": {"name": "cross_entropy"}},
            ["is for classification and language", "for regression", "huber"],
            "/loss/name",
        ),
        (
            {
                "dataset": {"name": "synthetic", "params": {"held_out_samples": 0}},
                "scheduler": {"name": "reduce_on_plateau"},
            },
            ["reduce_on_plateau", "holds nothing out"],
            "/scheduler/name",
        ),
        ({"model": {"name": "mpl"}}, ["no model 'mpl'", "mlp"], None),
        (
            {"scheduler": {"name": "cosine", "interval": "epoch"}, "optimizer": {"name": "adamv"}},
            ["no optimizer 'adamv'", "adamw"],
            None,
        ),
    ],
)
def test_a_misfit_names_both_sides_and_the_remedy(
    tmp_path: Path, blocks: dict[str, Any], words: list[str], pointer: str | None
) -> None:
    recorder = Recorder()
    with pytest.raises(InvalidComponent) as failure:
        run(job(**blocks), tmp_path, recorder)
    for word in words:
        assert word in failure.value.message
    assert failure.value.code == "invalid_component"
    assert failure.value.detail.get("pointer") == pointer
    assert recorder.rows == []
    assert recorder.total_steps is None


def test_a_misfit_of_data_is_a_data_error(tmp_path: Path) -> None:
    spec = job(model=GPT, dataset={"name": "text", "params": {"root": "/etc"}})
    with pytest.raises(DataError, match="may not read /etc") as failure:
        run(spec, tmp_path)
    assert failure.value.code == "data_error"


def test_the_precision_must_fit_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bf16 = DeviceCapability(device_type="cpu", bf16=False, name="an old machine")
    monkeypatch.setattr("halfstep.worker.amp.manager.capability_of", lambda _device: without_bf16)
    with pytest.raises(InvalidComponent, match="'an old machine' has no native BF16") as failure:
        run(job(precision={"precision_level": "bf16"}), tmp_path)
    assert failure.value.detail["pointer"] == "/precision"


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_built_in()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def bring_model(build: Callable[..., nn.Module]) -> None:
    register_model(
        "mine",
        NoParameters,
        summary="Mine.",
        inputs=(InputKind.FEATURES,),
        tasks=(Task.CLASSIFICATION, Task.REGRESSION),
    )(build)


def wrong_width(_parameters: NoParameters, data: DataInfo) -> nn.Module:
    return nn.Linear(data.shape[0], data.outputs + 1)


def wrong_input(_parameters: NoParameters, data: DataInfo) -> nn.Module:
    return nn.Linear(data.shape[0] + 1, data.outputs)


def without_weights(_parameters: NoParameters, data: DataInfo) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(data.outputs))


def no_module(_parameters: NoParameters, _data: DataInfo) -> Any:
    return "a model"


def raising(_parameters: NoParameters, _data: DataInfo) -> nn.Module:
    raise KeyError("layers")


def refusing(_parameters: NoParameters, _data: DataInfo) -> nn.Module:
    raise ValueError("layers must be even")


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            wrong_width,
            InvalidComponent,
            "output of shape [1, 5] for one sample, but classification needs [1, 4]",
        ),
        (wrong_input, InvalidComponent, "cannot take a sample of shape [16]"),
        (without_weights, InvalidComponent, "no trainable parameters"),
        (no_module, ComponentFailed, "built a str where a Module is needed"),
        (raising, ComponentFailed, "KeyError('layers')"),
        (refusing, InvalidComponent, "layers must be even"),
    ],
)
def test_a_model_of_ones_own_that_does_not_fit(
    tmp_path: Path, build: Callable[..., nn.Module], error: type[TrainingFailure], words: str
) -> None:
    bring_model(build)
    with pytest.raises(error) as failure:
        run(job(model={"name": "mine"}), tmp_path)
    assert words in failure.value.message
    assert failure.value.detail["pointer"] == "/model"


@pytest.mark.usefixtures("_own_registry")
def test_the_look_at_the_output_leaves_no_trace(tmp_path: Path) -> None:
    """Random numbers and BatchNorm statistics of the first step are those of a model nobody looked at."""

    class Model(nn.Module):
        def __init__(self, data: DataInfo) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(data.shape[0])
            self.out = nn.Linear(data.shape[0], data.outputs)
            self.states: list[tuple[bool, torch.Tensor, int]] = []
            made.append(self)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            batches = int(self.norm.num_batches_tracked)
            self.states.append((self.training, torch.get_rng_state(), batches))
            return self.out(self.norm(features + torch.rand_like(features)))

    made: list[Model] = []
    bring_model(lambda _parameters, data: Model(data))
    run(job(model={"name": "mine"}), tmp_path, stop_after=1)
    (looked, at_look, _), (trained, at_step, batches) = made[0].states
    assert (looked, trained, batches) == (False, True, 0)
    assert torch.equal(at_look, at_step)


@pytest.mark.usefixtures("_own_registry")
def test_a_dataset_that_raises_is_a_data_error(tmp_path: Path) -> None:
    def build(_parameters: NoParameters, _request: object) -> Any:
        raise OSError(5, "Input/output error")

    register_dataset("mine", NoParameters, summary="Mine.", task=Task.CLASSIFICATION)(build)
    with pytest.raises(TrainingFailure, match="Input/output error") as failure:
        run(job(dataset={"name": "mine"}), tmp_path)
    assert failure.value.code == "data_error"


@pytest.mark.usefixtures("_own_registry")
def test_a_loss_that_is_no_number_is_a_components_failure(tmp_path: Path) -> None:
    register_loss("mine", NoParameters, summary="Mine.", tasks=(Task.CLASSIFICATION,))(
        lambda _parameters, _data: lambda output, _target: output
    )
    with pytest.raises(ComponentFailed, match="step 1") as failure:
        run(job(loss={"name": "mine"}), tmp_path)
    assert failure.value.code == "component_error"
