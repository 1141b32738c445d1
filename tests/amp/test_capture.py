"""Replayed steps are the eager ones, to the bit; steps that cannot be recorded run as if nobody had tried.

On a CPU a stand-in records operations as strictly as a graph would; tests/gpu holds the same on the device.
"""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.errors import SetupError
from tests.amp.recordings import Recordings
from tests.amp.runs import OPTIMIZERS, Batch, Recorded, make_batches, make_mlp, make_norm_net

MEASURED = {
    "step_time_ms",
    "memory_usage",
    "memory_allocated_bytes",
    "memory_reserved_bytes",
    "memory_peak_bytes",
}
WATCHED, REHEARSED = 32, 3
BF16: dict[str, Any] = {"precision_level": "bf16"}
MODES: dict[str, dict[str, Any]] = {
    "fp16": {"precision_level": "fp16", "scale_window": 6, "initial_scale": 2.0**10, "max_scale": 2.0**60},
    "bf16": BF16,
    "islands": {"precision_level": "bf16", "fp32_layers": ["1"]},
    "manual": {"mode": "manual", "precision_level": "fp16", "initial_scale": 256.0},
    "selective": {"mode": "selective", "precision_level": "bf16", "selective_layers": ["0"]},
    "gradient_scaling": {"mode": "gradient_scaling", "precision_level": "fp32"},
    "fp32": {"precision_level": "fp32", "max_grad_norm": None},
}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    """The device's memory is not the host's, and its graphs are these."""
    stand_in = Recordings()
    monkeypatch.setattr("halfstep.worker.amp.step.training_step.host_sees", lambda _device: False)
    monkeypatch.setattr("halfstep.worker.amp.faster.capture.graphs_for", lambda _device: stand_in)
    return stand_in


def start(capture: str, make: Callable[[], nn.Module] = make_norm_net, **settings: Any) -> Recorded:
    setup = {name: settings.pop(name) for name in ("gradient_accumulation_steps",) if name in settings}
    optimizer_name = settings.pop("optimizer", "adamw-fused")
    schedule = settings.pop("schedule", None)
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if schedule is not None:
        setup["scheduler"], setup["scheduler_interval"] = schedule(optimizer)
    run = Recorded(MixedPrecisionConfig(**settings), model, optimizer, capture=capture, **setup)
    torch.manual_seed(5)
    return run


def both(drive: Callable[[Recorded], object], *arguments: Any, **settings: Any) -> Recorded:
    """Drive a captured and an eager run alike; the captured one, seen to be equal to the bit."""
    runs = []
    for capture in ("off", "auto"):
        run = start(capture, *arguments, **settings)
        drive(run)
        run.trainer.flush()
        runs.append(run)
    eager, captured = runs
    assert [decided(row) for row in captured.rows] == [decided(row) for row in eager.rows]
    theirs = eager.model.state_dict()
    for name, value in captured.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    return captured


def decided(row: Any) -> dict[str, str]:
    return {name: repr(getattr(row, name)) for name in row._fields if name not in MEASURED}


def told(run: Recorded) -> list[str]:
    return [event.message for event in run.events if event.data.get("code") == "capture_unavailable"]


def poisoned(count: int, *steps: int) -> list[Batch]:
    batches = make_batches(count)
    for step in steps:
        data, target = batches[step - 1]
        batches[step - 1] = (data * float("nan"), target)
    return batches


@pytest.mark.parametrize("mode", sorted(MODES))
def test_replayed_steps_are_the_eager_ones(mode: str, recordings: Recordings) -> None:
    run = both(lambda run: run.run(poisoned(150, 45, 120)), **MODES[mode])
    assert recordings.rehearsed == REHEARSED
    assert recordings.recorded == 1
    # The host watches the first steps, and those after an incident that it read at a decision step.
    assert recordings.replayed > 40
    skipped = [row.step for row in run.rows if row.skipped]
    assert {45, 120} <= set(skipped)
    assert told(run) == []
    if mode == "fp16":
        assert any(row.overflow for row in run.rows if row.step > WATCHED + REHEARSED)


@pytest.mark.parametrize("optimizer", ["adam-fused", "sgd-momentum-fused", "sgd-fused", "adagrad-fused"])
def test_every_fused_optimizer_replays(optimizer: str, recordings: Recordings) -> None:
    both(lambda run: run.run(poisoned(60, 40)), optimizer=optimizer, **BF16)
    assert recordings.replayed == 60 - WATCHED - REHEARSED


def test_rates_picked_on_the_device_move_in_a_replay(recordings: Recordings) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90), "step"

    run = both(lambda run: run.run(make_batches(80)), schedule=schedule, **BF16)
    assert recordings.replayed == 80 - WATCHED - REHEARSED
    assert len({row.learning_rate for row in run.rows}) == 80


def test_an_epochs_new_rate_is_recorded_anew(recordings: Recordings) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5), "epoch"

    run = both(lambda run: run.trainer.train(make_batches(80), 2), schedule=schedule, **BF16)
    assert recordings.recorded == 2
    assert recordings.replayed == 160 - WATCHED - 2 * REHEARSED
    assert {row.learning_rate for row in run.rows} == {1e-2, 5e-3}


def test_a_step_of_several_micro_batches_is_one_graph(recordings: Recordings) -> None:
    def drive(run: Recorded) -> None:
        run.trainer.train(make_batches(50 * 3 + 1), 1)

    both(drive, gradient_accumulation_steps=3, **BF16)
    assert recordings.replayed == 50 - WATCHED - REHEARSED


def test_micro_batches_that_come_one_by_one_are_not_captured(recordings: Recordings) -> None:
    run = both(lambda run: run.run(make_batches(90)), gradient_accumulation_steps=2, **BF16)
    assert recordings.recorded == 0
    (message,) = told(run)
    assert "give them to train_group together" in message


def test_a_short_batch_runs_between_replays(recordings: Recordings) -> None:
    batches = [*make_batches(40), *make_batches(1, size=5), *make_batches(10, seed=3)]
    both(lambda run: run.run(batches), **BF16)
    assert recordings.recorded == 1
    assert recordings.replayed == 50 - WATCHED - REHEARSED


def test_batches_of_many_shapes_are_not_captured(recordings: Recordings) -> None:
    batches = [batch for size in range(2, 14) for batch in make_batches(2, size=size)]
    run = both(lambda run: run.run([*make_batches(WATCHED), *batches]), **BF16)
    assert recordings.recorded == 0
    (message,) = told(run)
    assert "9 shapes and a graph holds one; pad or drop what is short" in message


def test_the_shape_that_comes_most_is_the_one_recorded_in_the_end(recordings: Recordings) -> None:
    batches = [*make_batches(WATCHED + REHEARSED + 5), *make_batches(120, size=5)]
    run = both(lambda run: run.run(batches), **BF16)
    assert recordings.recorded == 2
    assert recordings.replayed > 40
    assert told(run) == []


def test_what_a_step_returned_stays_its_own(recordings: Recordings) -> None:
    run = start("auto", **MODES["fp16"])
    run.model.train()
    results = [run.trainer.train_step(*batch) for batch in poisoned(50, 48)]
    run.trainer.flush()
    assert recordings.replayed > 10
    for result, row in zip(results, run.rows, strict=True):
        assert repr(result["loss"]) == repr(row.loss)
        assert (result["current_scale"], result["nan_detected"]) == (row.scale, row.nan)
        assert result["output_shape"] == (8, 4)


def test_what_a_step_of_several_micro_batches_returned_stays_its_own(recordings: Recordings) -> None:
    told = []
    for capture in ("off", "auto"):
        run = start(capture, gradient_accumulation_steps=2, **BF16)
        run.model.train()
        batches = make_batches(100)
        results = [run.trainer.train_group(pair) for pair in zip(batches[::2], batches[1::2], strict=True)]
        told.append([result["loss"] for result in results])
    assert recordings.replayed > 10
    eager, captured = told
    assert captured == eager
    assert len(set(captured)) == 50


class Idle(nn.Module):
    """Its first layer takes no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.idle = nn.Linear(12, 16)
        self.net = make_mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.net(x)
        return output


def test_gradients_that_are_kept_are_their_own_parameters(recordings: Recordings) -> None:
    run = both(lambda run: run.run(make_batches(50)), Idle, memory_efficiency=False, **BF16)
    assert recordings.replayed > 10
    assert [parameter.grad is None for parameter in run.model.idle.parameters()] == [True, True]
    shapes = [(p.grad.shape, p.shape) for p in run.model.net.parameters() if p.grad is not None]
    assert len(shapes) == 6
    assert all(ours == theirs for ours, theirs in shapes)


def test_gradients_that_are_kept_are_those_of_the_step(recordings: Recordings) -> None:
    batches = [*make_batches(40), *make_batches(1, size=5), *make_batches(5, seed=3)]
    eager, captured = (
        start(capture, memory_efficiency=False, precision_level="bf16") for capture in ("off", "auto")
    )
    for run in (eager, captured):
        run.model.train()
        run.gradients = []
        torch.manual_seed(5)
        for batch in batches:
            run.trainer.train_step(*batch)
            run.gradients.append([parameter.grad.clone() for parameter in run.model.parameters()])
    assert recordings.replayed == 45 - WATCHED - REHEARSED
    for ours, theirs in zip(captured.gradients, eager.gradients, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_gradients_are_let_go_of_otherwise(recordings: Recordings) -> None:
    run = start("auto", **BF16)
    run.run(make_batches(40))
    assert recordings.replayed
    assert all(parameter.grad is None for parameter in run.model.parameters())


class Odd(nn.Module):
    """Moves a buffer in its own way, draws, and may ask the host about its input."""

    asks_from = 10**9

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_norm_net()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        x = self.inner(x)
        return x if self.calls < self.asks_from or x.sum() < 1e9 else -x


class Asking(Odd):
    asks_from = WATCHED + REHEARSED + 1


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_that_cannot_be_recorded_runs_as_if_nobody_had_tried(
    enabled: bool, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not enabled:
        # A layer that replaces a buffer is found out before unless the guard of the step puts it back.
        monkeypatch.setattr(Asking, "__setattr__", _assign_in_place)
    run = both(lambda run: run.run(make_batches(60)), Asking, enabled=enabled)
    assert (recordings.recorded, recordings.replayed) == (0, 0)
    assert run.model.seen == 60
    (message,) = told(run)
    assert "RuntimeError: operation not permitted when stream is capturing" in message
    assert "keep the model's work on the device" in message


def _assign_in_place(module: nn.Module, name: str, value: Any) -> None:
    if name == "seen" and hasattr(module, "seen"):
        module.seen.copy_(value)
    else:
        nn.Module.__setattr__(module, name, value)


def test_a_device_that_refuses_at_the_end_of_a_recording(recordings: Recordings) -> None:
    recordings.refuse_at_end = RuntimeError("the recording is void\nCUDA kernel errors might be …")
    run = both(lambda run: run.run(make_batches(60)), Odd, **BF16)
    assert recordings.replayed == 0
    (message,) = told(run)
    assert "(RuntimeError: the recording is void)" in message


def test_a_layer_that_replaces_its_buffer_is_captured_under_the_guard_alone(recordings: Recordings) -> None:
    run = both(lambda run: run.run(make_batches(60)), Odd, **BF16)
    assert recordings.replayed == 60 - WATCHED - REHEARSED
    assert run.model.seen == 60
    run = both(lambda run: run.run(make_batches(60)), Odd, enabled=False)
    assert recordings.recorded == 1, "that of the run before"
    (message,) = told(run)
    assert "write into the buffer instead" in message


def test_what_rehearsal_finds_is_told(recordings: Recordings) -> None:
    recordings.unfit = "the host waits (net.py, line 3)"
    run = both(lambda run: run.run(make_batches(60)), **BF16)
    assert (recordings.rehearsed, recordings.recorded) == (1, 0)
    assert told(run) == [
        "capture: steps run operation by operation, not as one graph: the host waits (net.py, line 3)"
    ]


class Coin(nn.Module):
    """Skips its layer half of the time, as the host's dice fall."""

    def __init__(self) -> None:
        super().__init__()
        random.seed(3)
        self.inner = make_mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if random.random() < 0.5 else self.inner(x * 0.5)


def test_a_model_that_draws_from_pythons_generator_is_not_frozen(recordings: Recordings) -> None:
    run = both(lambda run: run.run(make_batches(60)), Coin, **BF16)
    (message,) = told(run)
    assert "Python's or NumPy's random numbers, which a graph would freeze" in message
    assert recordings.recorded == 0


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=100), "step"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"optimizer": "adamw"},
            "AdamW as it was made asks the host in every step; use Adam, AdamW or SGD with",
        ),
        ({"schedule": one_cycle}, "the scheduler asks the host in every step; let it move once an epoch"),
        ({"activation_checkpointing": True}, "switch one of the two off"),
    ],
    ids=["optimizer", "scheduler", "recomputing"],
)
def test_what_can_be_known_before_is_told_before(
    settings: dict[str, Any], reason: str, recordings: Recordings
) -> None:
    (message,) = told(start("auto", Odd, **BF16, **settings))
    assert reason in message
    run = both(lambda run: run.run(make_batches(50)), Odd, **BF16, **settings)
    assert told(run) == [message]
    assert recordings.rehearsed == 0


def test_a_cpu_has_no_graphs() -> None:
    run = both(lambda run: run.run(make_batches(5)), **BF16)
    assert told(run) == [
        (
            "capture: steps run operation by operation, not as one graph: that takes a CUDA device, and this "
            "run trains on cpu; set capture to 'off'"
        )
    ]


def test_an_unknown_way_to_capture_is_refused() -> None:
    with pytest.raises(SetupError, match=r"^capture: 'auto' or 'off', not 'on'$"):
        start("on")


def set_rate(run: Recorded) -> None:
    run.optimizer.param_groups[0]["lr"] = 3e-3


def set_betas(run: Recorded) -> None:
    run.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def freeze_norm(run: Recorded) -> None:
    run.model[1].eval()


def freeze_weight(run: Recorded) -> None:
    run.model[0].weight.requires_grad_(False)


def move_weight(run: Recorded) -> None:
    run.model[4].weight.data = run.model[4].weight.data.clone() * 2


def replace_buffer(run: Recorded) -> None:
    run.model[1].running_mean = torch.ones(16)


def reload(run: Recorded) -> None:
    state = copy.deepcopy(run.trainer.state_dict())
    run.trainer.load_state_dict(state)


def reload_optimizer(run: Recorded) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


@pytest.mark.parametrize(
    "change",
    [set_rate, set_betas, freeze_norm, freeze_weight, move_weight, replace_buffer, reload, reload_optimizer],
)
def test_what_the_host_changes_between_steps_is_obeyed(
    change: Callable[[Recorded], None], recordings: Recordings
) -> None:
    def drive(run: Recorded) -> None:
        run.model.train()
        for number, batch in enumerate(make_batches(70)):
            if number == 50:
                change(run)
            run.trainer.train_step(*batch)

    both(drive, **BF16)
    assert recordings.recorded == 2
    assert recordings.replayed == 70 - WATCHED - 2 * REHEARSED


def test_settings_that_never_rest_are_not_captured(recordings: Recordings) -> None:
    def drive(run: Recorded) -> None:
        run.model.train()
        for number, batch in enumerate(make_batches(90)):
            if number % 5 == 0:
                run.optimizer.param_groups[0]["lr"] *= 0.99
            run.trainer.train_step(*batch)

    run = both(drive, **BF16)
    assert recordings.recorded == 4
    (message,) = told(run)
    assert "change too often, and a graph freezes them" in message


def test_a_change_of_precision_is_recorded_anew(recordings: Recordings) -> None:
    settings = {
        "mode": "adaptive",
        "precision_level": "fp16",
        "memory_efficiency": False,
        "initial_scale": 256.0,
    }
    run = both(lambda run: run.run(poisoned(160, *range(60, 64))), **settings)
    assert [event.data["to"] for event in run.events if event.type == "precision"] == ["float32"]
    assert recordings.recorded == 2
    assert told(run) == []


def test_a_resumed_run_captures_and_goes_on_alike(recordings: Recordings) -> None:
    batches = poisoned(110, 50)
    straight = start("auto", **MODES["fp16"])
    straight.run(batches)
    first, second = start("auto", **MODES["fp16"]), start("auto", **MODES["fp16"])
    torch.manual_seed(5)
    first.run(batches[:90])
    before = recordings.recorded
    assert second.trainer.load_state_dict(copy.deepcopy(first.trainer.state_dict())) == []
    second.run(batches[90:])
    assert recordings.recorded == before + 1
    assert [decided(row) for row in second.rows] == [decided(row) for row in straight.rows[90:]]


def test_an_engine_state_of_another_precision_is_recorded_anew(
    recordings: Recordings, tmp_path: Path
) -> None:
    settings = {"mode": "adaptive", "precision_level": "bf16", "adaptive_threshold": 0.0}
    demoted = start("off", **settings)
    demoted.run(poisoned(64, *range(60, 64)))
    assert [event.data["to"] for event in demoted.events if event.type == "precision"][-1] == "float32"
    file = tmp_path / "state.pt"
    demoted.trainer.save_mixed_precision_state(file)

    def drive(run: Recorded) -> None:
        run.run(make_batches(60))
        run.trainer.load_mixed_precision_state(file)  # the optimizer's own state stays
        run.run(make_batches(20, seed=2))

    run = both(drive, **settings)
    assert run.rows[-1].compute_dtype == "float32"
    assert recordings.recorded == 2


def test_a_replay_that_fails_leaves_the_buffers_of_the_step_before(recordings: Recordings) -> None:
    run = start("auto", **BF16)
    run.run(make_batches(40))
    before = {name: value.clone() for name, value in run.model.named_buffers()}

    def fail() -> None:
        raise torch.OutOfMemoryError("no room to launch")

    recordings.before_replay = fail
    with pytest.raises(torch.OutOfMemoryError):
        run.trainer.train_step(*make_batches(1)[0])
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_buffers())
    assert run.trainer.current_step == 40


def test_an_optimizer_is_recorded_as_capturable_and_left_as_it_was(recordings: Recordings) -> None:
    run = start("auto", **BF16)
    seen: list[bool] = []
    run.optimizer.register_step_pre_hook(
        lambda optimizer, _args, _kwargs: seen.append(optimizer.param_groups[0]["capturable"])
    )
    run.run(make_batches(45))
    assert seen == [False] * (WATCHED + REHEARSED) + [True]
    assert run.optimizer.param_groups[0]["capturable"] is False


def test_a_batch_that_holds_more_than_tensors(recordings: Recordings) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_mlp()

        def forward(self, batch: dict[str, Any]) -> torch.Tensor:
            return self.inner(batch["x"]) * batch["by"]

    batches = [
        ({"x": data, "by": 1.0 if number < 45 else 2.0}, target)
        for number, (data, target) in enumerate(make_batches(55))
    ]
    both(lambda run: run.run(batches), Named, **BF16)
    assert (recordings.recorded, recordings.replayed) == (1, 45 - WATCHED - REHEARSED)
    odd = [({"x": data, "by": 1.0, "why": object()}, target) for data, target in make_batches(40)]
    run = both(lambda run: run.run(odd), Named, **BF16)
    (message,) = told(run)
    assert "a batch holds a object, which a graph cannot follow" in message
