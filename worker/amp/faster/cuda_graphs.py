"""CUDA graphs for `capture`: rehearsal and recording on a stream of their own, and tidying up after failure.

The only module that knows how torch records work on a GPU.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_WAITS = "called a synchronizing CUDA operation"
"""Part of what torch warns of where the host waits for the device."""

_NOT_COMPLETE = "does not yet detect all synchronizing operations"


def graphs_for(device: torch.device) -> "CudaGraphs | None":
    """The graphs of a device; None where it has none."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Records work on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Neither rehearsal nor recording may touch the default stream: autograd remembers on which stream a
        # parameter's gradient is summed, and a graph cannot wait for a stream that is not being recorded.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._scratch = torch.zeros(1, device=device)
        self._failed: list[torch.cuda.CUDAGraph] = []

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str | None]:
        """See `capture.Graphs.rehearse`."""
        drawn = torch.get_rng_state()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _waits_seen() as waits:
            result = work()
        current.wait_stream(self._stream)
        if waits:
            return result, (
                f"the host waits for the device in the step ({waits[0]}), which a graph cannot hold; keep "
                "values on the device"
            )
        if not torch.equal(drawn, torch.get_rng_state()):
            return result, (
                "the model draws random numbers on the CPU, which a graph would freeze; draw them on the "
                "device"
            )
        return result, None

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """See `capture.Graphs.record`."""
        torch.cuda.synchronize(self._device)
        # A tensor that is collected while recording would free memory in the middle of it.
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                result = self._recorded(graph, work)
        except BaseException:
            # Kept alive: older torch leaves the allocator asking a failed graph about every allocation.
            self._failed.append(graph)
            self._tidy_up()
            raise
        finally:
            if collecting:
                gc.enable()
        return graph.replay, result

    def _recorded(self, graph: torch.cuda.CUDAGraph, work: Callable[[], T]) -> T:
        # Other threads may go on using the device: a data loader pins memory, an event is asked for.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = work()
        except BaseException:
            with suppress(RuntimeError):  # what the work raised says more than that the recording is void
                graph.capture_end()
            raise
        graph.capture_end()
        return result

    def _tidy_up(self) -> None:
        """Take the device's generator out of the state that older torch leaves it in: by recording well."""
        with suppress(RuntimeError), torch.cuda.stream(self._stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            self._scratch.uniform_()
            graph.capture_end()
        torch.cuda.synchronize(self._device)


@contextmanager
def _waits_seen() -> Iterator[list[str]]:
    """Collects the places in the code at which the host waits for the device; they run all the same."""
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if mode == 0:  # a user who made a wait an error wants the error
                torch.cuda.set_sync_debug_mode("warn")
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if _WAITS in text:
            waits.append(f"{Path(warning.filename).name}, line {warning.lineno}")
        elif _NOT_COMPLETE not in text:
            _warn_again(warning)


def _warn_again(warning: Any) -> None:
    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
