"""MANUAL: the weights themselves in low precision, FP32 masters of them in the optimizer.

Normalisation layers stay in FP32, as does the loss. The masters are what is saved and exported.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.worker.amp.batches import cast_floating
from halfstep.worker.amp.kernels import kernels
from halfstep.worker.amp.layers import BorderCast, match_layers
from halfstep.worker.amp.policies.interface import PrecisionPolicy

_NORMALISATION = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class ManualPolicy(PrecisionPolicy):
    """Weights, activations and gradients in one low type; the update in FP32."""

    def __init__(
        self, device_type: str, dtype: torch.dtype, *, scales: bool, fp32_layers: tuple[str, ...] = ()
    ) -> None:
        self._kernels = kernels(device_type)
        self._fp32_layers = fp32_layers
        self._notices: tuple[str, ...] = ()
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._lowered_buffers: list[tuple[nn.Module, str, str]] = []
        self._border = BorderCast(
            region=None,
            cast_inputs=partial(cast_floating, dtype=torch.float32),
            cast_outputs=partial(cast_floating, dtype=dtype),
        )
        self._full = False
        self.compute_dtype = dtype
        self.scales = scales

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Lower the model in place and point the optimizer's groups to FP32 masters, state and all."""
        match = match_layers(model, self._fp32_layers, field="fp32_layers")
        self._notices = match.notices
        kept: set[nn.Module] = set()
        for module in (
            *match.modules.values(),
            *(m for m in model.modules() if isinstance(m, _NORMALISATION)),
        ):
            if module not in kept:
                self._border.attach(module)
                kept.update(module.modules())
        for prefix, module in model.named_modules():
            if module not in kept:
                self._lower(prefix, module)
        _repoint(optimizer, self._masters)

    @torch.no_grad()
    def detach(self) -> None:
        """Give the model its FP32 weights and buffers back; the optimizer keeps the masters."""
        self._border.detach()
        for low, master in self._masters.items():
            low.data = master.detach().clone()
            low.grad = None
        for module, name, _ in self._lowered_buffers:
            setattr(module, name, getattr(module, name).float())

    def borders(self) -> Iterable[BorderCast]:
        """Around the layers kept in FP32."""
        return (self._border,)

    def optimized(self, parameter: nn.Parameter) -> nn.Parameter:
        """The FP32 master of a lowered parameter; a parameter kept in FP32 is its own."""
        return self._masters.get(parameter, parameter)

    def cast_input(self, batch: Any) -> Any:
        """Floating tensors in the low type."""
        return cast_floating(batch, torch.float32 if self._full else self.compute_dtype)

    def cast_output(self, output: Any) -> Any:
        """FP32: the loss is computed in it."""
        return cast_floating(output, torch.float32)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add each low gradient to its master's FP32 gradient, and free it."""
        for low, master in self._masters.items():
            if low.grad is None:
                continue
            gradient = low.grad.float()
            if master.grad is None:
                master.grad = gradient
            else:
                master.grad.add_(gradient)
            low.grad = None

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Round the masters into the model's weights."""
        lows = [low.data for low in self._masters]
        self._kernels.copy(lows, [master.data for master in self._masters.values()])

    def release_gradients(self) -> None:
        """Free the low gradients of an unfinished step."""
        for low in self._masters:
            low.grad = None

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict with the masters in place of the lowered weights, every buffer in its own type."""
        weights = dict(model.state_dict())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in self._masters:
                weights[name] = self._masters[parameter].detach()
        for _, _, name in self._lowered_buffers:
            if name in weights:
                weights[name] = weights[name].float()
        return weights

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Take back what `weights` gave."""
        model.load_state_dict(weights)
        for name, parameter in model.named_parameters():
            if parameter in self._masters:
                self._masters[parameter].copy_(weights[name])
        self.publish_weights()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The masters in place of the lowered weights while the context is open."""
        lows = [low.data for low in self._masters]
        buffers = [(module, name, getattr(module, name)) for module, name, _ in self._lowered_buffers]
        self.release_gradients()
        for low, master in self._masters.items():
            low.data = master.data
        for module, name, buffer in buffers:
            setattr(module, name, buffer.float())
        self._full, self._border.enabled = True, False
        try:
            yield
        finally:
            self._full, self._border.enabled = False, True
            self.release_gradients()
            for low, data in zip(self._masters, lows, strict=True):
                low.data = data
            for module, name, buffer in buffers:
                setattr(module, name, buffer)

    def notices(self) -> Iterable[str]:
        """Patterns that mean no layer."""
        return self._notices

    @torch.no_grad()
    def _lower(self, prefix: str, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter not in self._masters:
                master = nn.Parameter(parameter.detach().float().clone(), parameter.requires_grad)
                parameter.data = parameter.data.to(self.compute_dtype)
                parameter.grad = None
                self._masters[parameter] = master
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != self.compute_dtype:
                setattr(module, name, buffer.to(self.compute_dtype))
                self._lowered_buffers.append((module, name, f"{prefix}.{name}" if prefix else name))


def _repoint(optimizer: Optimizer, masters: dict[nn.Parameter, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [masters.get(parameter, parameter) for parameter in group["params"]]
    for parameter, master in masters.items():
        if parameter in optimizer.state:
            optimizer.state[master] = optimizer.state.pop(parameter)
