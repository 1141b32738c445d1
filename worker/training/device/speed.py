"""How fast this device multiplies and convolves in each precision: measured once, then remembered.

The measurement takes a second, so what one process found is kept on disk for the next one on the same device,
with the same torch and as many threads. What the figures mean for a job is told by
`halfstep.service.contract.speed`.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional

from halfstep.service.contract.speed import DtypeSpeed

log = logging.getLogger(__name__)

DIRECTORY = "device-speed"
_FORMAT = 1

_ROUNDS = 8
_TURN_SECONDS = 0.02
"""Each kind of work has a turn in every round: other work on the machine, which comes and goes, then slows
none of them alone. The fastest repetition counts; the others tell of that other work."""
_ROUNDS_OF_THE_SLOW = 2
"""For work that takes longer than a turn: a hundred times slower is told as well by fewer repetitions."""

_EDGE = {"cpu": 256, "cuda": 4096}
"""On a CPU small enough that one product in an emulated FP16, a hundred times slower, is still short; on a
GPU large enough that the launch does not count."""
_IMAGES = {"cpu": (8, 32, 16), "cuda": (32, 128, 32)}
"""Batch, channels and edge of the convolution, 3x3."""

Work = Callable[[], object]


def device_speeds(device: torch.device, directory: Path | None) -> dict[str, DtypeSpeed]:
    """The speeds of `device` by data type, from `directory` where they were measured before.

    Args:
        device: a CPU or CUDA device; on a GPU this creates a context.
        directory: where results are kept; None: measure, and keep nothing. A file there that cannot be read
            or written costs the measurement and nothing else.
    """
    key = _key(device)
    file = None if directory is None else directory / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    found = None if file is None else _remembered(file, key)
    if found is None:
        found = measure(device)
        if file is not None:
            _remember(file, key, found)
    return found


def measure(device: torch.device) -> dict[str, DtypeSpeed]:
    """Measure now, for about a second."""
    works: dict[tuple[str, str], tuple[Work, float]] = {}
    for name, dtype in (
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ):
        works[name, "matmul"] = _product(device, dtype)
        works[name, "convolution"] = _convolution(device, dtype)
    if device.type == "cuda":
        works |= {
            ("tf32", kind): (_in_tf32(work), operations)
            for kind, (work, operations) in (
                ("matmul", _product(device, torch.float32)),
                ("convolution", _convolution(device, torch.float32)),
            )
        }
    fastest = dict.fromkeys(works, math.inf)
    for work, _ in works.values():
        work()  # the first call chooses kernels and allocates
    for turn in range(_ROUNDS):
        for which, (work, _) in works.items():
            if turn < _ROUNDS_OF_THE_SLOW or fastest[which] < _TURN_SECONDS:
                fastest[which] = min(fastest[which], _fastest(work, device))
    rates = {which: works[which][1] / seconds / 1e9 for which, seconds in fastest.items()}
    return {
        name: DtypeSpeed(
            matmul=_rounded(rates[name, "matmul"] / rates["float32", "matmul"]),
            convolution=_rounded(rates[name, "convolution"] / rates["float32", "convolution"]),
            matmul_gflops=_rounded(rates[name, "matmul"]),
            convolution_gflops=_rounded(rates[name, "convolution"]),
        )
        for name, kind in works
        if kind == "matmul"
    }


def _product(device: torch.device, dtype: torch.dtype) -> tuple[Work, float]:
    edge = _EDGE[device.type]
    left = torch.ones(edge, edge, dtype=dtype, device=device)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, left, out=out), 2.0 * edge**3


def _convolution(device: torch.device, dtype: torch.dtype) -> tuple[Work, float]:
    batch, channels, edge = _IMAGES[device.type]
    images = torch.ones(batch, channels, edge, edge, dtype=dtype, device=device, requires_grad=True)
    kernels = torch.ones(channels, channels, 3, 3, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.ones_like(images, requires_grad=False)

    def forward_and_backward() -> object:
        output = functional.conv2d(images, kernels, padding=1)
        return torch.autograd.grad(output, (images, kernels), gradient)

    forward = 2.0 * batch * channels * channels * 9 * edge * edge
    return forward_and_backward, 3 * forward


def _in_tf32(work: Work) -> Work:
    def run() -> object:
        with _tf32():
            return work()

    return run


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set while torch is imported
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = convolution.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before


def _fastest(work: Work, device: torch.device) -> float:
    fastest, deadline = math.inf, time.perf_counter() + _TURN_SECONDS
    while True:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        fastest = min(fastest, ended - began)
        if ended >= deadline:
            return fastest


def _rounded(figure: float) -> float:
    return float(f"{figure:.3g}")


def _key(device: torch.device) -> str:
    """What the figures depend on. A data directory may be shared by hosts that differ."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    return json.dumps([_FORMAT, device.type, name, str(torch.__version__), torch.get_num_threads()])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.processor()} {platform.machine()}"


_STORED = TypeAdapter(dict[str, DtypeSpeed])


def _remembered(file: Path, key: str) -> dict[str, DtypeSpeed] | None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["key"] != key:
            return None
        found = _STORED.validate_python(document["speeds"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        log.warning("%s is damaged, so the device is measured anew: %s", file, type(error).__name__)
        return None
    return found if {"float32", "float16", "bfloat16"} <= found.keys() else None


def _remember(file: Path, key: str, speeds: dict[str, DtypeSpeed]) -> None:
    document = {"key": key, "speeds": _STORED.dump_python(speeds)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(document, stream)
            os.replace(temporary, file)  # noqa: PTH105 - another worker reads the old file or the whole new one
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108 - it is a name, as mkstemp gave it
            raise
    except OSError as error:
        log.warning("the device's speed is not kept, and is measured again at each start: %s", error)
