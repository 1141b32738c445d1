"""Learning rates picked on the device are those of the scheduler, to the bit, and no step is waited for."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.diagnosis.repetition import WATCHED_STEPS
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp

pytestmark = pytest.mark.usefixtures("ending")

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.7),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.99),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 30, 100], gamma=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=10), lr_scheduler.CosineAnnealingLR(o, T_max=100)],
        milestones=[10],
    ),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=400, cycle_momentum=False),
    "onecycle-momentum": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=400),
}
ON_HOST = {"onecycle-momentum"}


# OneCycleLR cycles momentum, which Adagrad does not have.
PAIRS = [
    (scheduler, optimizer)
    for scheduler in sorted(SCHEDULERS)
    for optimizer in ("adamw-fused", "sgd-momentum-fused", "adagrad-fused")
    if (scheduler, optimizer) != ("onecycle-momentum", "adagrad-fused")
]


@pytest.mark.parametrize(("scheduler", "optimizer"), PAIRS)
def test_rates_picked_on_the_device_train_as_the_scheduler_does(scheduler: str, optimizer: str) -> None:
    batches = make_batches(150)
    reference = make_mlp()
    reference_optimizer = OPTIMIZERS[optimizer](reference.parameters())
    reference_scheduler = SCHEDULERS[scheduler](reference_optimizer)
    rates = []
    for data, target in batches:
        reference_optimizer.zero_grad()
        nn.functional.cross_entropy(reference(data), target).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        rates.append(reference_optimizer.param_groups[0]["lr"])
        reference_optimizer.step()
        reference_scheduler.step()

    model = make_mlp()
    ours_optimizer = OPTIMIZERS[optimizer](model.parameters())
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp32"),
        model,
        ours_optimizer,
        scheduler=SCHEDULERS[scheduler](ours_optimizer),
        scheduler_interval="step",
    )
    skipped = [(torch.full_like(data, float("nan")), target) for data, target in make_batches(3)]
    run.run([skipped[0], *batches[:40], *skipped[1:], *batches[40:]])
    assert [row.learning_rate for row in run.rows if not row.skipped] == rates
    assert [row.learning_rate for row in run.rows if row.skipped] == [rates[0], rates[40], rates[40]]
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    syncs = run.trainer.get_mixed_precision_stats()["performance_metrics"]["host_syncs_per_step"]
    assert (syncs == 1.0) is (scheduler in ON_HOST)
    assert syncs == 1.0 or syncs <= (2 + len(skipped) * WATCHED_STEPS) / 153
    saved = run.trainer.state_dict()
    assert saved["schedule"]["scheduler"]["last_epoch"] == 150
    assert type(saved["optimizer"]["param_groups"][0]["lr"]) is float
    assert saved["optimizer"]["param_groups"][0]["lr"] == reference_optimizer.param_groups[0]["lr"]


def test_a_scheduler_that_ends_tells_so_when_it_is_stepped_there() -> None:
    model = make_mlp()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False)
    run = Recorded(MixedPrecisionConfig(), model, optimizer, scheduler=scheduler, scheduler_interval="step")
    run.run(make_batches(30))
    with pytest.raises(ValueError, match="total steps"):
        run.trainer.state_dict()


@pytest.mark.parametrize(("scheduler", "optimizer"), [*PAIRS, ("multistep", "adamw"), ("sequential", "adam")])
def test_a_resumed_run_picks_the_same_rates(scheduler: str, optimizer: str) -> None:
    def start() -> Recorded:
        model = make_mlp()
        made = OPTIMIZERS[optimizer](model.parameters())
        return Recorded(
            MixedPrecisionConfig(precision_level="bf16"),
            model,
            made,
            scheduler=SCHEDULERS[scheduler](made),
            scheduler_interval="step",
        )

    batches = make_batches(40)
    straight = start()
    expected = [row.learning_rate for row in straight.run(batches)]
    first = start()
    first.run(batches[:25])
    file = io.BytesIO()
    torch.save(first.trainer.state_dict(), file)
    first.run(batches[25:33])
    first.trainer.state_dict()
    first.run(batches[33:])
    assert [row.learning_rate for row in first.rows] == expected, "saving does not disturb"
    for mine, theirs in zip(first.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    file.seek(0)
    second = start()
    second.trainer.load_state_dict(torch.load(file, weights_only=True))
    assert [row.learning_rate for row in second.run(batches[25:])] == expected[25:]
    for mine, theirs in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
