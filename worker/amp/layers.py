"""Modules by name: which ones a pattern means, which one owns a parameter, and casts at a module's border."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from halfstep.worker.amp.errors import SetupError


@dataclass(frozen=True, slots=True)
class LayerMatch:
    """The outermost modules that some patterns mean, by name, and a sentence for each pattern without one."""

    modules: dict[str, nn.Module]
    notices: tuple[str, ...]


def match_layers(model: nn.Module, patterns: Sequence[str], *, field: str) -> LayerMatch:
    """Find the modules that patterns mean: exact names, globs, or "re:" and an expression for a whole name.

    Args:
        model: where to look.
        patterns: what to look for; a match takes its whole subtree.
        field: the configuration field that the patterns come from, for messages.

    Raises:
        SetupError: no pattern means any module, or one is no regular expression.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    matched: set[str] = set()
    missing = []
    for pattern in patterns:
        names = _names_meant(pattern, modules, field)
        matched.update(names)
        if not names:
            missing.append(pattern)
    if patterns and not matched:
        raise SetupError(f"{field}: {_missing(missing, modules)}")
    notices = (f"{field}: {_missing(missing, modules)}",) if missing else ()
    roots: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if name in matched and not any(name.startswith(f"{other}.") for other in matched):
            roots.update(_called(name, module))
    return LayerMatch(roots, notices)


def _called(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module, or what it holds where nobody ever calls it: a ModuleList has no border to cast at."""
    if type(module).forward is not nn.Module.forward:
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _called(f"{name}.{child_name}", child)


class BorderCast:
    """Runs modules in a region of their own and casts the floating tensors that cross their border.

    Hooks, and not replaced methods: a copy of the model keeps them and they act on the copy.
    """

    def __init__(
        self,
        region: Callable[[], AbstractContextManager[object]] | None,
        cast_inputs: Callable[[Any], Any] | None,
        cast_outputs: Callable[[Any], Any] | None,
    ) -> None:
        self._region = region
        self._cast_inputs = cast_inputs
        self._cast_outputs = cast_outputs
        self._open: list[AbstractContextManager[object]] = []
        self._handles: list[RemovableHandle] = []
        self._crossing_in: Callable[..., Any] = self._cross_in
        self._crossing_out: Callable[..., Any] = self._cross_out
        self.enabled = True

    def attach(self, module: nn.Module) -> None:
        """Act on every later call of `module`."""
        self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
        # Prepended: of two borders around one module the inner one is left first. Always called: a region
        # left open by an exception would outlive the step.
        self._handles.append(module.register_forward_hook(self._leave, prepend=True, always_call=True))

    def keep_out_of_compiled_code(self) -> None:
        """Cross the border eagerly in a compiled model too.

        The compiler would move a region that one hook opens and another one closes.
        """
        if self._crossing_in == self._cross_in:
            self._crossing_in = torch.compiler.disable(self._cross_in)  # type: ignore[no-untyped-call]  # torch's
            self._crossing_out = torch.compiler.disable(self._cross_out)  # type: ignore[no-untyped-call]  # own

    def detach(self) -> None:
        """Leave every module as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._crossing_in(args, kwargs)

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return self._crossing_out(output)

    def _cross_in(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        region = self._region() if self.enabled and self._region is not None else None
        if region is not None:
            region.__enter__()
            self._open.append(region)
        if not self.enabled or self._cast_inputs is None:
            return None
        return self._cast_inputs(args), self._cast_inputs(kwargs)

    def _cross_out(self, output: Any) -> Any:
        if self.enabled and self._region is not None and self._open:
            self._open.pop().__exit__(None, None, None)
        if not self.enabled or self._cast_outputs is None or output is None:
            return None
        return self._cast_outputs(output)


class ParameterOrder:
    """Ranks an optimizer's parameters by their place in the model.

    The rank is the order of registration, which in nearly every model is that of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimized: Callable[[nn.Parameter], nn.Parameter],
    ) -> None:
        names = {id(optimized(parameter)): name for name, parameter in model.named_parameters()}
        ranks = {identity: rank for rank, identity in enumerate(names)}
        self._ranks = [ranks.get(id(parameter), -1) for parameter in parameters]
        self._layers = [name.rpartition(".")[0] or name for name in names.values()]

    def deepest(self, parameters: Sequence[int]) -> str | None:
        """The module that owns the last of these parameters; None where the model has none of them.

        Args:
            parameters: places in the list of the optimizer's parameters.
        """
        rank = max((self._ranks[index] for index in parameters), default=-1)
        return self._layers[rank] if rank >= 0 else None


def _names_meant(pattern: str, modules: dict[str, nn.Module], field: str) -> list[str]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise SetupError(f"{field}: '{pattern}' is no regular expression: {error}") from error
        return [name for name in modules if expression.fullmatch(name)]
    if pattern in modules:
        return [pattern]
    return fnmatch.filter(modules, pattern) if any(c in pattern for c in "*?[") else []


def _missing(patterns: Sequence[str], modules: dict[str, nn.Module]) -> str:
    close = list(
        dict.fromkeys(
            name for p in patterns for name in difflib.get_close_matches(p, modules, n=3, cutoff=0.5)
        )
    )
    shown = close or list(modules)[:10]
    label = "the closest names are" if close else "the model's layers are"
    quoted = ", ".join(f"'{pattern}'" for pattern in patterns)
    names = ", ".join(f"'{name}'" for name in shown) or "none"
    return f"no layer matches {quoted}; {label} {names}"
