"""The step under way, as the host sees it: what its micro-batches have left behind so far."""

import math
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from halfstep.worker.amp.step.gradients import Present
from halfstep.worker.amp.update.snapshots import RandomStates


@dataclass(slots=True)
class Group:
    """The micro-batches of the step that is under way."""

    size: int
    seen: int = 0
    loss_sum: Tensor | None = None
    samples: int = 0
    micro_batches: list[tuple[Any, Any]] = field(default_factory=list)
    random_states: RandomStates | None = None
    learning_rate: float = math.nan
    last_loss: Tensor | None = None
    output_shape: Any = None
    gradients: Present | None = None
    prepared: bool = False

    def take(self, recorded: "Group", loss: Tensor | None) -> None:
        """Stand where `recorded` stood when it was recorded; `loss` is the last micro-batch's, if at hand."""
        self.seen, self.samples = recorded.seen, recorded.samples
        self.output_shape, self.gradients = recorded.output_shape, recorded.gradients
        self.last_loss = cast("Tensor", recorded.last_loss).clone() if loss is None else loss
