"""SELECTIVE: named subtrees under autocast, everything else in FP32."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from halfstep.worker.amp.batches import cast_floating
from halfstep.worker.amp.layers import BorderCast, match_layers
from halfstep.worker.amp.policies.interface import PrecisionPolicy
from halfstep.worker.amp.policies.islands import Fp32Islands


class SelectivePolicy(PrecisionPolicy):
    """Each selected subtree runs in an autocast region of its own and gives FP32 back."""

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype,
        *,
        scales: bool,
        selective_layers: tuple[str, ...],
        fp32_layers: tuple[str, ...] = (),
    ) -> None:
        self._device_type = device_type
        self._selective_layers = selective_layers
        self._islands = Fp32Islands(device_type, fp32_layers)
        self._borders: dict[str, BorderCast] = {}
        self._notices: tuple[str, ...] = ()
        self.compute_dtype = dtype
        self.scales = scales

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the layers and put a border around each.

        Raises:
            SetupError: selective_layers or fp32_layers mean no layer of this model.
        """
        del optimizer
        selected = match_layers(model, self._selective_layers, field="selective_layers")
        for name, module in selected.modules.items():
            border = BorderCast(
                region=partial(torch.autocast, self._device_type, dtype=self.compute_dtype),
                cast_inputs=None,
                cast_outputs=partial(cast_floating, dtype=torch.float32),
            )
            border.attach(module)
            self._borders[name] = border
        self._islands.attach(model)
        self._notices = (*selected.notices, *self._islands.notices)

    def detach(self) -> None:
        """Take the borders away again."""
        self._islands.detach()
        for border in self._borders.values():
            border.detach()

    @property
    def lowered(self) -> tuple[str, ...]:
        """The subtrees that run in low precision now."""
        return tuple(name for name, border in self._borders.items() if border.enabled)

    def lower(self, names: Iterable[str]) -> None:
        """Run exactly these of the selected subtrees in low precision, the others in FP32."""
        wanted = set(names)
        for name, border in self._borders.items():
            border.enabled = name in wanted

    def subtree_of(self, layer: str) -> str | None:
        """The lowered subtree that `layer` is in."""
        return next((name for name in self.lowered if layer == name or layer.startswith(f"{name}.")), None)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Every layer in FP32 while the context is open."""
        lowered = self.lowered
        self.lower(())
        try:
            yield
        finally:
            self.lower(lowered)

    def state_dict(self) -> dict[str, Any]:
        """Which subtrees are lowered."""
        return {"lowered": list(self.lowered)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.lower(state["lowered"])

    def borders(self) -> Iterable[BorderCast]:
        """Around the selected subtrees and fp32_layers."""
        return (*self._borders.values(), self._islands.border)

    def notices(self) -> Iterable[str]:
        """Patterns that mean no layer."""
        return self._notices
