from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.amp.runs import OPTIMIZERS


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
