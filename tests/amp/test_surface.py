"""The library as its users meet it: names, the training loops, the lazy result, the record."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import halfstep
from halfstep.worker.amp import (
    MixedPrecisionConfig,
    MixedPrecisionMode,
    MixedPrecisionTrainer,
    PrecisionLevel,
)
from halfstep.worker.amp.diagnosis.repetition import WATCHED_STEPS
from halfstep.worker.amp.errors import SetupError, StepError
from halfstep.worker.amp.step import training_step
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp, make_norm_net


def test_the_public_names_are_exactly_these() -> None:
    assert halfstep.__all__ == [
        "MixedPrecisionConfig",
        "MixedPrecisionManager",
        "MixedPrecisionMode",
        "MixedPrecisionState",
        "MixedPrecisionTrainer",
        "PrecisionLevel",
    ]
    assert all(hasattr(halfstep, name) for name in halfstep.__all__)


def test_basic_usage() -> None:
    config = MixedPrecisionConfig(
        enabled=True,
        mode=MixedPrecisionMode.AUTOMATIC,
        precision_level=PrecisionLevel.MIXED,
        gradient_scaling=True,
        loss_scaling=True,
        dynamic_loss_scaling=True,
    )
    trainer = MixedPrecisionTrainer(config)
    model = nn.Sequential(nn.Linear(784, 10))
    optimizer = torch.optim.Adam(model.parameters())
    criterion = nn.CrossEntropyLoss()
    trainer.setup_training(model, optimizer, criterion)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 784, generator=generator)
    dataset = TensorDataset(inputs, inputs[:, :10].argmax(1))
    train_loader = DataLoader(dataset, batch_size=32, shuffle=True)
    history = trainer.train(train_loader, num_epochs=10)
    assert history is trainer.training_history
    assert len(history) == trainer.current_epoch == 10
    assert history[-1]["epoch_loss"] < 0.7 * history[0]["epoch_loss"]
    assert history[-1].keys() == {
        "epoch_loss",
        "num_batches",
        "overflow_steps",
        "underflow_steps",
        "nan_steps",
        "average_scale",
    }
    stats = trainer.get_mixed_precision_stats()
    assert stats.keys() >= {
        "current_step",
        "current_scale",
        "overflow_count",
        "underflow_count",
        "nan_count",
        "average_scale",
        "memory_usage",
        "performance_metrics",
    }
    assert stats["current_step"] == 80
    assert stats["current_scale"] == 1.0, "BF16 is never scaled"
    assert 0 < stats["memory_usage"] < 1


@pytest.mark.usefixtures("ending")
def test_a_step_gives_its_mapping_and_asks_the_device_only_when_read() -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp16"), model, OPTIMIZERS["adamw-fused"](model.parameters())
    )
    batches = make_batches(WATCHED_STEPS + 1)
    run.run(batches[:-1])
    with HostReads() as reads:
        result = run.trainer.train_step(*batches[-1])
        assert reads.count == 0
        assert isinstance(result["loss"], float)
        assert reads.count == 1
    assert dict(result) == {
        "loss": run.run([])[-1].loss,
        "current_scale": 65536.0,
        "overflow_detected": False,
        "underflow_detected": False,
        "nan_detected": False,
        "memory_usage": result["memory_usage"],
        "output_shape": torch.Size([8, 4]),
        "target_shape": torch.Size([8]),
        "device": "cpu",
        "is_step": True,
    }


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value, and refuses the ways that a dispatch mode does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the host read a tensor inside a step")

        for name in ("tolist", "numpy", "cpu", "__array__"):
            self._patch.setattr(torch.Tensor, name, refuse)
        return super().__enter__()

    def __exit__(self, *details: object) -> None:
        self._patch.undo()
        super().__exit__(*details)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {"precision_level": "fp16", "scale_window": 9, "initial_scale": 2.0**8, "max_scale": 2.0**13},
        {"precision_level": "bf16"},
        {"mode": "gradient_scaling", "precision_level": "fp32", "scale_window": 9},
    ],
    ids=["fp16", "bf16", "gradient_scaling"],
)
@pytest.mark.parametrize("optimizer", ["adam-fused", "adamw-fused", "adagrad-fused", "sgd-momentum-fused"])
@pytest.mark.usefixtures("ending")
def test_a_steady_state_step_reads_nothing_back(settings: dict[str, Any], optimizer: str) -> None:
    model = make_norm_net()
    run = Recorded(MixedPrecisionConfig(**settings), model, OPTIMIZERS[optimizer](model.parameters()))
    batches = make_batches(102)
    run.run(batches[:WATCHED_STEPS])  # on a GPU these are watched, for incidents to be looked into
    with HostReads() as reads:
        for batch in batches[WATCHED_STEPS:]:
            run.trainer.train_step(*batch)
    assert reads.count == 0
    rows = run.run([])
    assert [row.step for row in rows] == list(range(1, 103))
    assert not any(row.skipped for row in rows), "an incident may be looked into, and is not a steady state"
    assert len({row.scale for row in rows}) > 3 or settings["precision_level"] == "bf16"


@pytest.mark.parametrize(("sees", "expected"), [(True, 0), (False, 10)])
def test_an_optimizer_that_is_not_fused_reads_once_a_step_and_says_so(
    sees: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "host_sees", lambda device: sees)
    model = make_mlp()
    # SGD: Adam and its like read their own step counters besides.
    run = Recorded(MixedPrecisionConfig(), model, OPTIMIZERS["sgd-momentum"](model.parameters()))
    batches = make_batches(12)
    with HostReads() as reads:
        for batch in batches[:10]:
            run.trainer.train_step(*batch)
    assert reads.count == expected, "a CPU's memory is looked at, not read"
    metrics = run.trainer.get_mixed_precision_stats()["performance_metrics"]
    assert metrics["host_syncs_per_step"] == 1.0
    assert metrics["steps_per_second"] > 0
    assert metrics["samples_per_second"] == pytest.approx(8 * metrics["steps_per_second"])


class Endless(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Any:
        return iter([(data[0], target[0]) for data, target in make_batches(10)])


def test_a_loader_without_a_length_works_and_an_empty_one_is_an_error() -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(), model, OPTIMIZERS["adamw"](model.parameters()), gradient_accumulation_steps=4
    )
    summary = run.trainer.train_epoch(DataLoader(Endless(), batch_size=1))
    assert summary["num_batches"] == 10
    assert [row.step for row in run.rows] == [1, 2, 3]
    with pytest.raises(ValueError, match="no batch"):
        run.trainer.train_epoch([])
    assert run.trainer.current_epoch == 1


def test_streamed_micro_batches_of_a_short_step_weigh_as_in_a_group() -> None:
    batches = make_batches(6)
    models = [make_mlp(), make_mlp()]
    runs = [
        Recorded(
            MixedPrecisionConfig(precision_level="fp32", max_grad_norm=None),
            model,
            torch.optim.SGD(model.parameters(), lr=0.5),
            gradient_accumulation_steps=4,
        )
        for model in models
    ]
    streamed, grouped = runs
    streamed.run(batches)
    assert streamed.trainer.finish_accumulation()
    assert not streamed.trainer.finish_accumulation()
    grouped.trainer.train_group(batches[:4])
    grouped.trainer.train_group(batches[4:])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_nested_batches_and_token_ids() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.head = nn.Linear(9, 4)

        def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, (extra,) = batch["tokens"], batch["more"]
            assert tokens.dtype is torch.int64
            hidden = torch.cat((self.table(tokens), extra.to(self.table.weight.dtype)), dim=1)
            return self.head(hidden), hidden

    def criterion(output: tuple[torch.Tensor, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(output[0], target["class"])

    model = Net()
    run = Recorded(MixedPrecisionConfig(), model, torch.optim.AdamW(model.parameters()), criterion=criterion)
    batch = {"tokens": torch.arange(5), "more": (torch.randn(5, 1),)}
    result = run.trainer.train_step(batch, {"class": torch.zeros(5, dtype=torch.int64)})
    assert result["output_shape"] == (torch.Size([5, 4]), torch.Size([5, 9]))
    assert result["target_shape"] == {"class": torch.Size([5])}
    assert math.isfinite(result["loss"])


def test_evaluation_leaves_training_as_it_was() -> None:
    def train(evaluate: bool) -> tuple[nn.Module, torch.Tensor]:
        model = make_norm_net()
        run = Recorded(MixedPrecisionConfig(), model, OPTIMIZERS["adamw"](model.parameters()))
        batches = make_batches(8)
        torch.manual_seed(5)
        model.train()
        model[1].eval()
        for batch in batches:
            run.trainer.train_step(*batch)
            if evaluate:
                with run.trainer.evaluation_region() as predict:
                    assert not model.training
                    torch.rand(3)
                    output = predict(batch[0])
                    assert output.dtype is torch.bfloat16
                    assert not output.requires_grad
                assert model.training
                assert not model[1].training
        return model, torch.rand(1)

    (plain, plain_draw), (evaluated, evaluated_draw) = train(evaluate=False), train(evaluate=True)
    assert torch.equal(plain_draw, evaluated_draw)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, evaluated.state_dict()[name]), name


def test_evaluating_in_the_middle_of_a_step_is_refused() -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(), model, OPTIMIZERS["adamw"](model.parameters()), gradient_accumulation_steps=2
    )
    run.trainer.train_step(*make_batches(1)[0])
    with pytest.raises(StepError, match="finish_accumulation"), run.trainer.evaluation_region():
        pass
    with pytest.raises(StepError, match="finish it first"):
        run.trainer.state_dict()


def test_the_engine_draws_nothing_from_the_global_generator() -> None:
    model = make_mlp()
    before = torch.get_rng_state()
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp16"), model, OPTIMIZERS["adamw-fused"](model.parameters())
    )
    run.run(make_batches(40))
    run.trainer.get_mixed_precision_stats()
    run.trainer.state_dict()
    assert torch.equal(before, torch.get_rng_state())


def test_rows_are_delivered_once_in_order_with_their_own_figures() -> None:
    model = make_mlp()
    config = MixedPrecisionConfig(precision_level="fp16", initial_scale=2.0**30, max_scale=2.0**30)
    run = Recorded(config, model, OPTIMIZERS["adamw-fused"](model.parameters()))
    rows = run.run(make_batches(50))
    assert [row.step for row in rows] == list(range(1, 51))
    assert rows[0].overflow
    halvings = [row.scale for row in rows]
    for before, row, scale in zip(rows, rows[1:], halvings[1:], strict=False):
        assert scale == (before.scale / 2 if before.overflow else before.scale), row
    assert not rows[-1].skipped
    assert all(row.step_time_ms > 0 and 0 < row.memory_usage < 1 for row in rows)
    assert all(row.memory_peak_bytes >= row.memory_allocated_bytes > 10**6 for row in rows)
    stats = run.trainer.get_mixed_precision_stats()
    assert stats["average_scale"] == pytest.approx(sum(halvings) / 50)
    assert stats["overflow_count"] == sum(row.overflow for row in rows)
    overflows = [event for event in run.events if event.type == "overflow"]
    assert len(overflows) == 1, "one event for a run of overflows"
    assert overflows[0].data["layer"] in {"0", "2", "4"}


def test_log_lines_come_at_their_frequency(caplog: pytest.LogCaptureFixture) -> None:
    model = make_mlp()
    run = Recorded(MixedPrecisionConfig(logging_frequency=16), model, OPTIMIZERS["adamw"](model.parameters()))
    with caplog.at_level(logging.INFO, logger="halfstep.worker.amp"):
        run.run(make_batches(40))
    assert [record.args[0] for record in caplog.records if record.msg.startswith("Step")] == [16, 32]


def test_monitoring_switched_off_measures_no_time() -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(performance_monitoring=False), model, OPTIMIZERS["adamw"](model.parameters())
    )
    assert math.isnan(run.run(make_batches(1))[0].step_time_ms)
    assert "steps_per_second" not in run.trainer.get_mixed_precision_stats()["performance_metrics"]


@pytest.mark.parametrize("freed", [True, False])
def test_memory_efficiency_frees_gradients_between_steps(freed: bool) -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(memory_efficiency=freed), model, OPTIMIZERS["adamw"](model.parameters())
    )
    run.run(make_batches(1))
    assert all((parameter.grad is None) is freed for parameter in model.parameters())


def test_a_plateau_scheduler_follows_the_metric_it_is_given() -> None:
    model = make_mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    run = Recorded(MixedPrecisionConfig(), model, optimizer, scheduler=scheduler)
    for metric, rate in ((1.0, 1e-2), (2.0, 5e-3), (None, 5e-3), (3.0, 2.5e-3)):
        run.run(make_batches(1))
        run.trainer.end_epoch(metric)
        assert optimizer.param_groups[0]["lr"] == rate


class TestBadSetup:
    def setup(self, **changes: Any) -> None:
        model = make_mlp()
        parts: dict[str, Any] = {"model": model, "criterion": nn.CrossEntropyLoss()}
        parts["optimizer"] = torch.optim.AdamW(model.parameters())
        parts |= changes
        MixedPrecisionTrainer(MixedPrecisionConfig()).setup_training(**parts)

    def test_lbfgs(self) -> None:
        with pytest.raises(SetupError, match="optimizer: LBFGS"):
            self.setup(optimizer=torch.optim.LBFGS(make_mlp().parameters()))

    def test_accumulation(self) -> None:
        with pytest.raises(SetupError, match="gradient_accumulation_steps: at least 1"):
            self.setup(gradient_accumulation_steps=0)

    def test_interval(self) -> None:
        with pytest.raises(SetupError, match="scheduler_interval"):
            self.setup(scheduler_interval="batch")

    def test_a_scheduler_of_another_optimizer(self) -> None:
        other = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
        with pytest.raises(SetupError, match="another optimizer"):
            self.setup(scheduler=torch.optim.lr_scheduler.StepLR(other, 1))

    def test_a_model_without_parameters(self) -> None:
        with pytest.raises(SetupError, match="one device"):
            self.setup(model=nn.ReLU())

    def test_a_step_before_setup(self) -> None:
        with pytest.raises(StepError, match="setup_training"):
            MixedPrecisionTrainer(MixedPrecisionConfig()).train_step(torch.zeros(1), torch.zeros(1))

    def test_a_loss_that_is_no_number(self) -> None:
        model = make_mlp()
        run = Recorded(
            MixedPrecisionConfig(),
            model,
            torch.optim.AdamW(model.parameters()),
            criterion=nn.CrossEntropyLoss(reduction="none"),
        )
        with pytest.raises(StepError, match="must return one number"):
            run.run(make_batches(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_losses_are_added_and_divided_in_fp32(dtype: torch.dtype) -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp32"),
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        criterion=lambda output, target: nn.functional.cross_entropy(output, target).to(dtype),
        gradient_accumulation_steps=3,
    )
    losses = [run.trainer.train_step(*batch)["loss"] for batch in make_batches(3)]
    (row,) = run.run([])
    assert row.loss == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_a_one_dimensional_fp16_loss_survives_its_scale() -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp16", initial_scale=2.0**15),
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        criterion=lambda output, target: output.half().square().mean().reshape(1) + 2.0,
    )
    row = run.run(make_batches(1))[0]
    assert row.loss >= 2.0
    assert not row.skipped
