from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfstep.worker.amp.step import training_step
from tests.amp.runs import OPTIMIZERS

ENDINGS = ["in numbers", "in tensors"]


@pytest.fixture(params=ENDINGS)
def ending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways for a step to end: as on a CPU, and as on a GPU, whose tensors the host does not see."""
    if request.param == "in tensors":
        monkeypatch.setattr(training_step, "host_sees", lambda device: False)


@pytest.fixture(params=sorted(OPTIMIZERS))
def make_optimizer(request: pytest.FixtureRequest) -> Callable[[Any], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


@pytest.fixture
def torch_like() -> dict[str, Any]:
    """The conditions under which the scale moves exactly as torch's GradScaler."""
    return {
        "precision_level": "fp16",
        "scale_window": 5,
        "overflow_threshold": 0.25,
        "underflow_handling": False,
        "max_scale": 2.0**60,
        "min_scale": 2.0**-60,
    }
