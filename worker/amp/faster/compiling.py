"""The model's forward pass through torch.compile, and the way back to eager where it cannot be compiled.

Only training steps run compiled. Evaluation, and the repetition of a skipped step under watch, run the module
itself, whose state and names are the same.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from halfstep.worker.amp.batches import tensors_of
from halfstep.worker.amp.errors import SetupError
from halfstep.worker.amp.kernels import backward_compiled_at_once, kernels
from halfstep.worker.amp.policies import PrecisionPolicy
from halfstep.worker.amp.update.snapshots import BufferGuard, RandomStates

CompileMode = Literal["off", "default", "max-autotune"]

_TORCH_MODES = {
    "default": "default",
    # Whole steps are captured by `capture`: a second kind of graphs inside it would only copy and conflict.
    "max-autotune": "max-autotune-no-cudagraphs",
}


def forward_of(
    model: nn.Module,
    mode: CompileMode,
    *,
    policy: PrecisionPolicy,
    device: torch.device,
    tell: Callable[[str], None],
) -> Callable[[Any], Any]:
    """The model's forward pass for training steps: the model itself where `mode` is "off".

    Args:
        model: what is compiled, at its first call.
        mode: as `setup_training` takes it.
        policy: its borders inside the model stay outside compiled code.
        device: of the model.
        tell: takes a sentence that says why the model trains uncompiled after all.
    """
    if mode == "off":
        return model
    if mode not in _TORCH_MODES:
        raise SetupError(f"compile: 'off', 'default' or 'max-autotune', not {mode!r}")
    return CompiledForward(model, _TORCH_MODES[mode], policy=policy, device=device, tell=tell)


class CompiledForward:
    """A compiled model that turns into the plain one for good where the compiler fails."""

    def __init__(
        self,
        model: nn.Module,
        torch_mode: str,
        *,
        policy: PrecisionPolicy,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        self._model = model
        self._mode = torch_mode
        self._policy = policy
        self._device = device
        self._tell = tell
        self._compiled: Callable[[Any], Any] | None = None
        self._given_up = False
        self._known: set[Any] = set()

    def __call__(self, batch: Any) -> Any:
        """The model's output for a batch."""
        if self._given_up:
            return self._model(batch)
        kind = self._kind(batch)
        if self._compiled is not None and kind in self._known:
            return self._compiled(batch)
        return self._first_of(kind, batch)

    def _kind(self, batch: Any) -> Any:
        """What the compiler specialises on and this engine changes."""
        device_type = self._device.type
        return (
            tuple((tensor.shape, tensor.dtype) for tensor in tensors_of(batch)),
            self._model.training,
            torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
            tuple(border.enabled for border in self._policy.borders()),
        )

    def _first_of(self, kind: Any, batch: Any) -> Any:
        """A call that may compile. Where it fails, the eager call starts from where it did."""
        buffers = BufferGuard(self._model, kernels(self._device.type))
        buffers.snapshot()
        random_states = RandomStates(self._device)
        try:
            with warnings.catch_warnings(), backward_compiled_at_once():
                # The compiler warns of parts of torch that it uses itself.
                warnings.simplefilter("ignore")
                output = self._compile()(batch)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a compiler fails in any way it likes; the model's own error comes again
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            self._known.add(kind)
            return output
        random_states.restore()
        buffers.restore()
        output = self._model(batch)
        self._given_up, self._compiled = True, None
        self._tell(
            f"compile: the model could not be compiled and trains uncompiled: {reason}. {_remedy(reason)}"
        )
        return output

    def _compile(self) -> Callable[[Any], Any]:
        if self._compiled is None:
            for border in self._policy.borders():
                border.keep_out_of_compiled_code()
            self._compiled = torch.compile(self._model, mode=self._mode)
        return self._compiled


def _remedy(reason: str) -> str:
    if "compiler" in reason.lower() and "c" in reason.lower():
        return "Install a C++ compiler (g++) where the job runs, or set compile to 'off'"
    return "Set compile to 'off', or try the model under torch.compile by itself"
