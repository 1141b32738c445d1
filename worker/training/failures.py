"""From an exception in a component or in the engine to the failure that a client reads.

Only code that is not ours to fix, or that ran out of something, is translated; an exception of the observer
passes through untouched.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from halfstep.service.contract.precision import UnsupportedPrecisionError
from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import ReasonCode
from halfstep.worker.amp.errors import NonFiniteError, SetupError, StepError
from halfstep.worker.remedies import less_memory
from halfstep.worker.training.errors import (
    ComponentFailed,
    InvalidComponent,
    NonFinite,
    OutOfMemory,
    TrainingFailure,
)

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
            str(error),
            code=ReasonCode(error.cause),
            detail={"step": error.step, "layer": error.layer, "verdict": error.verdict},
        ) from error
    except (SetupError, UnsupportedPrecisionError) as error:
        raise InvalidComponent(
            f"the precision does not fit this model or device: {error}", detail={"pointer": "/precision"}
        ) from error
    except StepError as error:
        raise ComponentFailed(f"{doing} failed: {error}") from error
    except Exception as error:
        short = out_of_memory(spec, doing, error)
        if short is not None:
            raise short from error
        text = str(error)
        if isinstance(error, RuntimeError) and "deterministic" in text:
            raise ComponentFailed(
                f"{doing} needs an operation that has no deterministic kernel: {_first_line(text)} Set "
                "training.deterministic to false, or change the model",
                detail={"pointer": "/training/deterministic"},
            ) from error
        raise ComponentFailed(
            f"{doing} failed in a component's own code: {type(error).__name__}: {_first_line(text)}. The "
            "detail has where; correct the component or its parameters, then submit or retry the job",
            detail={"exception": type(error).__name__, "traceback": traceback.format_exc()[-4000:]},
        ) from error


def out_of_memory(spec: JobSpec, doing: str, error: Exception) -> OutOfMemory | None:
    """The failure to tell where memory ran out, the device's or the host's; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        code, where = ReasonCode.OUT_OF_MEMORY_DEVICE, "device"
    elif isinstance(error, MemoryError) or ran_out_of_host_memory(error):
        code, where = ReasonCode.OUT_OF_MEMORY_HOST, "host"
    else:
        return None
    training = spec.training
    return OutOfMemory(
        f"{doing} ran out of memory on the {where} at batch_size {training.batch_size}. {less_memory(spec)} "
        f"{_first_line(str(error))}".rstrip(),
        code=code,
        detail={
            "batch_size": training.batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
        },
    )


def ran_out_of_host_memory(error: Exception) -> bool:
    """True for what torch raises when the host's allocator fails, which is no MemoryError."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _HOST_ALLOCATOR)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:500] if text.strip() else ""
