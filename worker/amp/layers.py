"""Which module a parameter belongs to, and in which order the model uses them."""

import torch
from torch import Tensor, nn

from worker.amp.policies import PrecisionPolicy


class ParameterOrder:
    """Ranks an optimizer's parameters by their place in the model.

    The rank is the order of registration, which in nearly every model is that of the forward pass.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], policy: PrecisionPolicy) -> None:
        names = {id(policy.optimized(parameter)): name for name, parameter in model.named_parameters()}
        ranks = {identity: rank for rank, identity in enumerate(names)}
        self._ranks = {id(p): ranks.get(id(p), -1) for p in parameters}
        self._layers = [name.rpartition(".")[0] or name for name in names.values()]
        self._tensor: Tensor | None = None
        self._tensor_of = 0

    def deepest_non_finite(self, norms: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """The highest rank among parameters with a non-finite gradient norm, else -1 (float32, 0-d)."""
        if self._tensor is None or self._tensor_of != norms.numel():
            ranks = [float(self._ranks[id(p)]) for p in parameters if p.grad is not None]
            self._tensor = torch.tensor(ranks, dtype=torch.float32, device=norms.device)
            self._tensor_of = norms.numel()
        return torch.where(torch.isfinite(norms), -1.0, self._tensor).max()

    def layer(self, rank: int) -> str | None:
        """The module that owns the parameter of that rank; None below 0."""
        return self._layers[rank] if rank >= 0 else None
