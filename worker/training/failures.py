"""From an exception in a component or in the engine to the failure that a client reads.

Only code that is not ours to fix, or that ran out of something, is translated; an exception of the observer
passes through untouched.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.contract.precision import UnsupportedPrecisionError
from service.contract.spec import JobSpec
from service.contract.states import ReasonCode
from worker.amp.errors import NonFiniteError, SetupError, StepError
from worker.training.errors import ComponentFailed, InvalidComponent, NonFinite, OutOfMemory, TrainingFailure

_HOST_ALLOCATOR = (
    "DefaultCPUAllocator",
    "not enough memory",
    "Cannot allocate memory",
    "can't allocate memory",
)


@contextmanager
def translated(spec: JobSpec, doing: str) -> Iterator[None]:
    """Run component and engine code.

    What it raises leaves as a TrainingFailure that says what was being done.
    """
    try:
        yield
    except TrainingFailure:
        raise
    except NonFiniteError as error:
        raise NonFinite(
            str(error), code=ReasonCode(error.cause), detail={"step": error.step, "layer": error.layer}
        ) from error
    except (SetupError, UnsupportedPrecisionError) as error:
        raise InvalidComponent(
            f"the precision does not fit this model or device: {error}", detail={"pointer": "/precision"}
        ) from error
    except StepError as error:
        raise ComponentFailed(f"{doing} failed: {error}") from error
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(spec, doing, ReasonCode.OUT_OF_MEMORY_DEVICE, "device", str(error)) from error
    except MemoryError as error:
        raise _out_of_memory(spec, doing, ReasonCode.OUT_OF_MEMORY_HOST, "host", str(error)) from error
    except Exception as error:
        text = str(error)
        if ran_out_of_host_memory(error):
            raise _out_of_memory(spec, doing, ReasonCode.OUT_OF_MEMORY_HOST, "host", text) from error
        if isinstance(error, RuntimeError) and "deterministic" in text:
            raise ComponentFailed(
                f"{doing} needs an operation that has no deterministic kernel: {_first_line(text)} Set "
                "training.deterministic to false, or change the model",
                detail={"pointer": "/training/deterministic"},
            ) from error
        raise ComponentFailed(
            f"{doing} failed in a component's own code: {type(error).__name__}: {_first_line(text)}",
            detail={"exception": type(error).__name__},
        ) from error


def ran_out_of_host_memory(error: Exception) -> bool:
    """True for what torch raises when the host's allocator fails, which is no MemoryError."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _HOST_ALLOCATOR)


def _out_of_memory(spec: JobSpec, doing: str, code: ReasonCode, where: str, text: str) -> OutOfMemory:
    training = spec.training
    remedies = []
    if training.batch_size > 1:
        smaller = training.batch_size // 2
        remedies.append(
            f"batch_size {smaller} with gradient_accumulation_steps "
            f"{-(-training.batch_size * training.gradient_accumulation_steps // smaller)}, which trains the "
            "same"
        )
    if not spec.precision.activation_checkpointing:
        remedies.append("precision.activation_checkpointing true")
    remedies.append("a smaller model")
    return OutOfMemory(
        f"{doing} ran out of memory on the {where} at batch_size {training.batch_size}. Try "
        f"{', or '.join(remedies)}. {_first_line(text)}",
        code=code,
        detail={
            "batch_size": training.batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
        },
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:500] if text.strip() else ""
