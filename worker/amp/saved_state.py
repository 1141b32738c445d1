"""The shape of a saved run: versioned, tensors and primitives alone, loadable with weights_only=True."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from halfstep.worker.amp.errors import StateMismatchError

STATE_FORMAT = 1

_PRIMITIVES = (bool, int, float, complex, str, bytes, type(None))


def plain(value: Any, path: str = "state") -> Any:
    """A copy made of tensors, primitives, dicts, lists, tuples and counters.

    Raises:
        StateMismatchError: it holds something else, which could not be loaded without running its code.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in _PRIMITIVES:
        return value
    if isinstance(value, Counter):
        return Counter(value)
    if isinstance(value, Mapping):
        pairs = {key: plain(item, f"{path}.{key}") for key, item in value.items()}
        return OrderedDict(pairs) if isinstance(value, OrderedDict) else pairs
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    for primitive in (int, float, str):
        # NumPy's scalars and enumerations inherit from these, and would be pickled by their own class.
        if isinstance(value, primitive):
            return primitive(value)
    raise StateMismatchError(
        f"{path} is a {type(value).__name__}: only tensors, numbers, strings and their containers can be "
        f"saved"
    )


def check_format(state: Mapping[str, Any]) -> None:
    """Refuse a state of another format."""
    found = state.get("format")
    if found != STATE_FORMAT:
        raise StateMismatchError(f"saved state of format {found!r}; this version reads format {STATE_FORMAT}")


def config_differences(saved: Mapping[str, Any], running: Mapping[str, Any]) -> list[str]:
    """Each field whose saved value differs from the running one, as "field: saved x, running y"."""
    return [
        f"{name}: saved {saved.get(name)!r}, running {running.get(name)!r}"
        for name in sorted({*saved, *running})
        if saved.get(name) != running.get(name)
    ]
