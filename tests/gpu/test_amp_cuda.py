"""The engine on a CUDA device: types, scale, parity, no host sync, memory."""

import copy
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.service.contract.precision import MixedPrecisionMode, PrecisionLevel
from halfstep.worker.amp import MixedPrecisionConfig
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp, make_norm_net
from tests.amp.test_cells import REFUSED, Net, Seen
from tests.amp.test_parity import assert_same_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
FUSED = ["adam-fused", "adamw-fused", "sgd-momentum-fused", "sgd-fused"]


def on_gpu(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(data.cuda(), target.cuda()) for data, target in batches]


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [mode.value for mode in MixedPrecisionMode])
@pytest.mark.parametrize("level", [level.value for level in PrecisionLevel])
def test_every_cell(mode: str, level: str) -> None:
    if (mode, level) in REFUSED:
        return
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    fields: dict[str, Any] = {"mode": mode, "precision_level": level, "allow_emulated_bf16": not native}
    if mode == "selective":
        fields["selective_layers"] = ["second"]
    if mode == "adaptive":
        fields["adaptive_threshold"] = 0.0
    torch.manual_seed(0)
    model = Net().cuda()
    holder: list[Seen] = []

    def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return holder[0].criterion(output, target)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    run = Recorded(MixedPrecisionConfig(**fields), model, optimizer, criterion=criterion)
    holder.append(Seen(model))
    rows = run.run(on_gpu(make_batches(1)) * 40)
    assert rows[-1].loss < rows[0].loss
    low = {"fp32": F32, "fp16": F16, "bf16": B16, "mixed": F16, "dynamic": B16 if native else F16}[level]
    scaled = low is F16 or mode == "gradient_scaling"
    last = rows[-1]
    assert last.compute_dtype == str(F32 if mode == "gradient_scaling" else low).removeprefix("torch.")
    assert (last.scale > 1.0) is scaled
    types = holder[0].types
    if low is F32:
        assert set(types.values()) == {(F32, F32, F32)}
    elif mode == "manual":
        assert types["first"] == (low, low, low)
        assert types["norm"][1:] == (F32, low)
    elif mode == "selective":
        assert types["second"] == (F32, F32, F32)
    else:
        # CUDA's autocast runs layer_norm in FP32 and gives FP32.
        assert types["first"] == (F32, F32, low)
        assert types["second"][2] is low
    assert {value.dtype for value in run.trainer.state_dict()["model"].values()} == {F32}


@pytest.mark.parametrize("optimizer", [*FUSED, "adamw", "adam-foreach", "sgd-momentum-foreach"])
def test_automatic_is_torch_amp(optimizer: str) -> None:
    batches = on_gpu(make_batches(200))
    reference = make_mlp().cuda()
    reference_optimizer = OPTIMIZERS[optimizer](reference.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16, growth_interval=5)
    scales = []
    for data, target in batches:
        reference_optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(reference(data), target)
        scaler.scale(loss).backward()
        scaler.unscale_(reference_optimizer)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        scales.append(scaler.get_scale())
        scaler.step(reference_optimizer)
        scaler.update()
    model = make_mlp().cuda()
    config = MixedPrecisionConfig(
        precision_level="fp16",
        scale_window=5,
        overflow_threshold=0.25,
        underflow_handling=False,
        max_scale=2.0**60,
        min_scale=2.0**-60,
    )
    run = Recorded(config, model, OPTIMIZERS[optimizer](model.parameters()))
    assert [row.scale for row in run.run(batches)] == scales
    assert any(later < earlier for earlier, later in pairwise(scales)), "no step overflowed"
    assert any(later > earlier for earlier, later in pairwise(scales)), "the scale never grew"
    assert_same_run(run, (reference, reference_optimizer))


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("good_steps_before", [0, 40])
@pytest.mark.parametrize("level", ["fp16", "bf16"])
def test_a_skipped_step_changes_nothing(optimizer: str, good_steps_before: int, level: str) -> None:
    model = make_norm_net().cuda()
    run = Recorded(
        MixedPrecisionConfig(precision_level=level), model, OPTIMIZERS[optimizer](model.parameters())
    )
    batches = on_gpu(make_batches(good_steps_before + 2))
    run.run(batches[:good_steps_before])
    before = copy.deepcopy((model.state_dict(), run.optimizer.state_dict()["state"]))
    data, target = batches[-2]
    bad = run.run([(torch.full_like(data, float("nan")), target)])[-1]
    assert bad.skipped
    assert bad.nan
    after = (model.state_dict(), run.optimizer.state_dict()["state"])
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert before[1].keys() == after[1].keys()
    for index, state in before[1].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[1][index][key])), key
    run.run(batches[-1:])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_fused_sgd_whose_first_step_overflows() -> None:
    model = make_norm_net().cuda()
    config = MixedPrecisionConfig(precision_level="fp16", initial_scale=2.0**40, max_scale=2.0**40)
    run = Recorded(config, model, OPTIMIZERS["sgd-momentum-fused"](model.parameters()))
    rows = run.run(on_gpu(make_batches(60)))
    assert rows[0].overflow
    assert not rows[-1].skipped
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    "settings",
    [
        {"precision_level": "fp16", "scale_window": 10, "initial_scale": 256.0, "max_scale": 2.0**12},
        {"precision_level": "bf16"},
        {"mode": "manual", "precision_level": "fp16", "initial_scale": 256.0},
        {"mode": "selective", "precision_level": "fp16", "selective_layers": ["0"], "initial_scale": 256.0},
        {"mode": "adaptive", "precision_level": "fp16", "initial_scale": 256.0, "adaptive_threshold": 0.0},
        {"mode": "gradient_scaling", "precision_level": "fp32"},
    ],
    ids=["fp16", "bf16", "manual", "selective", "adaptive", "gradient_scaling"],
)
@pytest.mark.parametrize("by_step", [False, True])
def test_a_hundred_steady_steps_wait_for_nothing(
    settings: dict[str, Any], by_step: bool, request: pytest.FixtureRequest
) -> None:
    model = make_norm_net().cuda()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000) if by_step else None
    run = Recorded(
        MixedPrecisionConfig(**settings),
        model,
        optimizer,
        scheduler=scheduler,
        scheduler_interval="step" if by_step else "epoch",
    )
    batches = on_gpu(make_batches(8))
    run.run(batches * 5)
    request.getfixturevalue("sync_is_an_error")
    for batch in (batches * 13)[:100]:
        run.trainer.train_step(*batch)
    torch.cuda.set_sync_debug_mode("default")
    rows = run.run([])
    assert [row.step for row in rows] == list(range(1, 141))
    assert not any(row.skipped for row in rows)


class Sleepy(nn.Module):
    """Lets the GPU, not the host, take its time in the steps that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.cycles = make_norm_net(), 0

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return self.net(data)


@pytest.mark.real_device
def test_step_times_are_the_gpus_own_and_nobody_waits_for_them() -> None:
    cycles = 200_000_000  # about a tenth of a second; measured below
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    slept_ms = begin.elapsed_time(end)

    model = Sleepy().cuda()
    run = Recorded(MixedPrecisionConfig(), model, OPTIMIZERS["adamw-fused"](model.parameters()))
    batches = on_gpu(make_batches(8))
    run.run(batches * 5)
    host_ms = []
    for number, batch in enumerate(batches, start=1):
        model.cycles = cycles if number == 4 else 0
        began = time.perf_counter()
        run.trainer.train_step(*batch)
        host_ms.append((time.perf_counter() - began) * 1e3)
    times = [row.step_time_ms for row in run.run([])[-8:]]
    assert slept_ms < times[3] < slept_ms * 1.5
    assert sum(times) - times[3] < slept_ms / 2
    assert sum(host_ms) < slept_ms / 2, "the host ran ahead"


def test_resume_is_bit_exact() -> None:
    batches = on_gpu(make_batches(60))

    def start() -> Recorded:
        model = make_norm_net().cuda()
        optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.9)
        config = MixedPrecisionConfig(precision_level="fp16", scale_window=6, max_scale=2.0**40)
        return Recorded(config, model, optimizer, scheduler=scheduler, scheduler_interval="step")

    straight = start()
    torch.cuda.manual_seed(1)
    expected = straight.run(batches)
    first = start()
    torch.cuda.manual_seed(1)
    first.run(batches[:29])
    saved, rng = copy.deepcopy(first.trainer.state_dict()), torch.cuda.get_rng_state()
    second = start()
    second.trainer.load_state_dict(saved)
    torch.cuda.set_rng_state(rng)
    rows = second.run(batches[29:])
    assert [(row.loss, row.scale) for row in rows] == [(row.loss, row.scale) for row in expected[29:]]
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_adaptive_goes_low_where_full_precision_takes_too_much_memory() -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.Linear(64, 4)).cuda()
    ballast = torch.empty(
        torch.cuda.get_device_properties(0).total_memory // 10, dtype=torch.uint8, device="cuda"
    )
    for threshold, low in ((0.05, True), (0.9, False)):
        torch.cuda.reset_peak_memory_stats()
        config = MixedPrecisionConfig(mode="adaptive", precision_level="fp16", adaptive_threshold=threshold)
        run = Recorded(config, model, OPTIMIZERS["adamw-fused"](model.parameters()))
        rows = run.run(on_gpu(make_batches(8)))
        assert [row.compute_dtype for row in rows] == ["float32"] * 3 + ["float16" if low else "float32"] * 5
    del ballast


def test_out_of_memory_is_clear_and_the_next_step_is_healthy() -> None:
    model = make_mlp().cuda()
    run = Recorded(MixedPrecisionConfig(), model, OPTIMIZERS["adamw-fused"](model.parameters()))
    batches = on_gpu(make_batches(4))
    run.run(batches[:1])
    hog = model[0].register_forward_pre_hook(
        lambda *_: torch.empty(torch.cuda.get_device_properties(0).total_memory * 2, device="cuda") and None
    )
    with pytest.raises(torch.OutOfMemoryError):
        run.trainer.train_step(*batches[1])
    hog.remove()
    assert [row.step for row in run.run(batches[2:])] == [1, 2, 3]


def test_a_spoilt_layer_is_named_where_the_host_is_watching() -> None:
    model = make_norm_net().cuda()
    run = Recorded(
        MixedPrecisionConfig(precision_level="bf16"), model, OPTIMIZERS["adamw-fused"](model.parameters())
    )

    def spoil(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("inf") if run.trainer.current_step == 5 else None

    model[0].register_forward_hook(spoil)
    run.run(on_gpu(make_batches(10)))
    (event,) = [event for event in run.events if event.type == "nan"]
    assert (event.step, event.data["layer"], event.data["kind"]) == (6, "0", "forward")
