"""ADAPTIVE and level DYNAMIC: when precision changes, when not, and that a resumed run decides alike."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.errors import NonFiniteLoss, TooManySkips
from halfstep.worker.amp.record.memory import MemoryMonitor
from tests.amp.runs import Batch, Recorded, make_batches, make_mlp


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of memory that is said to be used: the last element."""
    shares = [0.05]
    monkeypatch.setattr(MemoryMonitor, "peak_share", lambda self: shares[-1])
    return shares


def start(model: nn.Module | None = None, **fields: Any) -> Recorded:
    model = make_mlp() if model is None else model
    fields = {"mode": "adaptive", "precision_level": "bf16"} | fields
    return Recorded(
        MixedPrecisionConfig(**fields), model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    )


def types(run: Recorded) -> str:
    return "".join({"float32": "F", "bfloat16": "B", "float16": "H"}[row.compute_dtype] for row in run.rows)


def changes(run: Recorded) -> list[tuple[int, str, str, str]]:
    return [
        (event.step, event.data["from"], event.data["to"], event.data["reason"])
        for event in run.events
        if event.type == "precision"
    ]


def bad(batch: Batch) -> Batch:
    return torch.full_like(batch[0], float("nan")), batch[1]


def test_low_precision_starts_where_full_precision_peaks_above_the_threshold(peak: list[float]) -> None:
    peak.append(0.2)
    run = start(adaptive_threshold=0.1)
    run.run(make_batches(70))
    assert types(run) == "FFF" + "B" * 67
    assert changes(run) == [(3, "float32", "bfloat16", "memory")]
    figures = next(event for event in run.events if event.type == "precision").data["figures"]
    assert figures == {"peak_share": 0.2, "adaptive_threshold": 0.1}


def test_it_is_latched_and_cannot_flip_flop(peak: list[float]) -> None:
    peak.append(0.2)
    run = start()
    run.run(make_batches(10))
    peak.append(0.0)
    run.run(make_batches(90))
    assert types(run)[3:] == "B" * 97


def test_full_precision_stays_where_it_fits_until_a_new_shape_does_not(peak: list[float]) -> None:
    run = start()
    run.run(make_batches(32))
    peak.append(0.5)
    run.run(make_batches(32))
    assert types(run) == "F" * 64, "the same shape is not looked at again"
    run.run(make_batches(33, size=9))
    assert types(run)[64:] == "F" * 32 + "B"
    assert changes(run) == [
        (3, "float32", "float32", "memory_fits"),
        (96, "float32", "bfloat16", "memory"),
    ]


def test_entering_fp16_starts_the_scale_anew(peak: list[float]) -> None:
    peak.append(0.5)
    run = start(precision_level="fp16", initial_scale=2.0**10)
    rows = run.run(make_batches(6))
    assert [row.scale for row in rows] == [1.0] * 3 + [1024.0] * 3
    assert run.trainer.get_mixed_precision_stats()["current_scale"] == 1024.0


def test_without_the_memory_rule_low_precision_is_used_from_the_start(peak: list[float]) -> None:
    run = start(memory_efficiency=False)
    run.run(make_batches(10))
    assert types(run) == "B" * 10


class OutOfMemoryInFull(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_mlp()
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.fails_at = 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.drop(x)
        if self.calls == self.fails_at and not torch.is_autocast_enabled("cpu"):
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)


def test_out_of_memory_is_tried_once_in_low_precision_with_the_same_randomness(peak: list[float]) -> None:
    model = OutOfMemoryInFull()
    run = start(model)
    torch.manual_seed(0)
    run.run(make_batches(8))
    assert types(run) == "FFFFBBBB"
    assert changes(run) == [
        (3, "float32", "float32", "memory_fits"),
        (4, "float32", "bfloat16", "out_of_memory"),
    ]
    # A run that is told the decision takes it without failing, and draws the same dropout masks.
    replayed_model = OutOfMemoryInFull()
    replayed_model.fails_at = -1
    replayed = start(replayed_model)
    replayed.trainer.replay_decisions([event.data for event in run.events if event.type == "precision"])
    torch.manual_seed(0)
    replayed.run(make_batches(8))
    assert [row.loss for row in replayed.rows] == [row.loss for row in run.rows]


def test_out_of_memory_in_low_precision_is_the_callers(peak: list[float]) -> None:
    model = OutOfMemoryInFull()
    run = start(model, mode="automatic")
    model.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        run.run(make_batches(1))


def dynamic(**fields: Any) -> Recorded:
    return start(**({"mode": "automatic", "precision_level": "dynamic", "scale_window": 40} | fields))


def test_three_nan_in_a_row_demote_at_the_decision_step_and_a_dwell_promotes_again() -> None:
    run = dynamic()
    batches = make_batches(300)
    run.run([*batches[:5], bad(batches[5]), bad(batches[6]), *batches[7:32]])
    assert types(run) == "B" * 32
    assert changes(run) == [], "two in a row are tolerated"
    run.run([bad(batches[0]), bad(batches[1]), bad(batches[2]), *batches[35:64]])
    run.run(batches[:120])
    # 40 good steps from step 65 are over at 104; 128 is the next decision step.
    assert types(run) == "B" * 64 + "F" * 64 + "B" * 56
    assert changes(run) == [
        (64, "bfloat16", "float32", "nan"),
        (128, "float32", "bfloat16", "dwell"),
    ]


def test_the_dwell_doubles_and_the_fourth_demotion_is_for_good() -> None:
    run = dynamic(scale_window=16)
    good, lost = make_batches(32), [bad(batch) for batch in make_batches(3)]
    spoiled = [*lost, *good[:29]]
    for _ in range(40):
        run.run(spoiled if run.rows == [] or types(run)[-32:].count("F") == 0 else good)
        if len(run.rows) > 750:
            break
    found = [(after, reason) for _, _, after, reason in changes(run)]
    assert found.count(("float32", "nan")) == 4
    assert found.count(("bfloat16", "dwell")) == 3
    assert found[-1] == ("float32", "nan")
    steps = [step for step, *_ in changes(run)]
    dwells = [up - down for down, up in zip(steps[::2], steps[1::2], strict=False)]
    assert dwells == [32, 64, 96], "16, 32 and 64 good steps, of 29, 61 and 93 until the decision step"


def test_demotion_comes_before_too_many_skips() -> None:
    run = dynamic(max_consecutive_skips=10)
    lost = [bad(batch) for batch in make_batches(32)]
    run.run(lost)
    assert changes(run) == [(32, "bfloat16", "float32", "nan")]
    with pytest.raises(TooManySkips):
        run.run(lost)


def test_a_new_shape_in_full_precision_does_not_cut_the_dwell_short(peak: list[float]) -> None:
    peak.append(0.5)
    run = start(scale_window=60)
    lost = [bad(batch) for batch in make_batches(3)]
    run.run([*make_batches(20), *lost, *make_batches(9)])
    run.run(make_batches(64, size=5))
    assert types(run) == "FFF" + "B" * 29 + "F" * 64
    assert [reason for *_, reason in changes(run)] == ["memory", "nan", "dwell"]


def test_a_demotion_does_not_hide_a_failure_that_was_asked_for() -> None:
    run = dynamic(nan_handling=False)
    with pytest.raises(NonFiniteLoss):
        run.run([bad(batch) for batch in make_batches(32)])


def test_an_exhausted_scale_demotes() -> None:
    fields = {"mode": "adaptive", "precision_level": "fp16", "memory_efficiency": False}
    model = nn.Linear(12, 4)
    run = Recorded(
        MixedPrecisionConfig(**fields, initial_scale=4.0, max_consecutive_skips=100, max_grad_norm=1e-6),
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True),
        # A gradient of 1e6 times the scale: beyond FP16 at every scale, not beyond FP32.
        criterion=lambda output, target: 1e6 * output.float().sum(),
    )
    batches = make_batches(40, size=64)
    run.run(batches)
    assert changes(run) == [(32, "float16", "float32", "scale_exhausted")]
    assert [row.skipped for row in run.rows] == [True] * 32 + [False] * 8
    assert run.rows[-1].scale == 1.0


def test_a_share_of_overflows_above_a_hundred_budgets_demotes() -> None:
    fields = {"mode": "adaptive", "precision_level": "fp16", "memory_efficiency": False}
    tight = {"scale_window": 100, "overflow_threshold": 1e-4, "initial_scale": 2.0**24}
    run = start(**fields, **tight)
    run.run(make_batches(33))
    assert changes(run)[0][3] == "overflow_share"
    loose = start(**fields, **(tight | {"scale_window": 2000}))
    loose.run(make_batches(33))
    assert changes(loose) == []
    assert sum(row.overflow for row in loose.rows) == sum(row.overflow for row in run.rows[:32]) >= 2


def test_selective_dynamic_removes_the_layer_that_the_trouble_came_from() -> None:
    model = make_mlp()
    config = MixedPrecisionConfig(
        mode="selective", precision_level="dynamic", selective_layers=["0", "2"], scale_window=40
    )
    run = Recorded(config, model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    trouble = {"on": False}

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        # Inside low precision only, as an operation that overflows there would.
        return output * float("inf") if trouble["on"] and torch.is_autocast_enabled("cpu") else output

    model[2].register_forward_hook(spoil, prepend=True)
    trouble["on"] = True
    run.run(make_batches(40))
    assert changes(run) == [(32, "bfloat16: 0, 2", "bfloat16: 0", "nan")]
    assert [row.skipped for row in run.rows] == [True] * 32 + [False] * 8
    assert {row.compute_dtype for row in run.rows} == {"bfloat16"}


@pytest.mark.parametrize("stop", [2, 3, 10, 64, 70, 100])
def test_a_resumed_run_decides_alike(stop: int, peak: list[float]) -> None:
    peak.append(0.3)
    batches = make_batches(200)
    batches[40:43] = [bad(batch) for batch in batches[40:43]]
    straight = start(scale_window=20)
    straight.run(batches)
    assert [reason for *_, reason in changes(straight)] == ["memory", "nan", "dwell"]
    first = start(scale_window=20)
    first.run(batches[:stop])
    saved = copy.deepcopy(first.trainer.state_dict())
    peak.append(0.0)
    second = start(scale_window=20)
    second.trainer.load_state_dict(saved)
    second.trainer.replay_decisions([e.data for e in straight.events if e.type == "precision"])
    rows = second.run(batches[stop:])
    assert [(row.loss, row.compute_dtype) for row in rows if not row.nan] == [
        (row.loss, row.compute_dtype) for row in straight.rows[stop:] if not row.nan
    ]
