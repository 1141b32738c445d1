"""Whole steps as a CUDA graph, and the model compiled, beside the bare eager loop: a launch-bound MLP, a GPT.

In each round every loop trains for the same number of steps over the same batches, in an order drawn anew,
and its time is divided by the bare loop's time of that round. Compiling and recording are left out of the
times; how long compiling took is shown.

`python -m benchmarks.graph` on a CUDA device. What a CPU has:
`python -m benchmarks.graph --device cpu --loops "bare, eager" "ours, eager" "ours, compiled"`
"""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.loops.works import LEARNING_RATE, MAX_GRAD_NORM, PRECISIONS, WORKS, Setting
from benchmarks.support.report import Report, options
from halfstep.worker.amp import MixedPrecisionConfig, MixedPrecisionTrainer
from halfstep.worker.training import randomness
from halfstep.worker.training.assembly import Assembly, assemble
from halfstep.worker.training.data.plan import Plan

BASE = "bare, eager"
PRECISION = PRECISIONS | {"fp16": {"mode": "automatic", "precision_level": "fp16"}}
_WARM_UP = 96
"""Steps before the first round: a GPU's first steps are watched by the host, then comes the recording."""


class Parts:
    """Model, criterion, fused AdamW and batches on one device, the same for each loop."""

    def __init__(self, work: str, device: torch.device) -> None:
        randomness.seed_all(0)
        spec = Setting(work, "bf16").spec
        size = spec.training.batch_size

        def plan(samples: int) -> Plan:
            return Plan(samples=samples, batch_size=size, accumulation=1, epochs=None, max_steps=None)

        parts: Assembly = assemble(spec, device, (), plan)
        parts.model.train()
        self.model, self.criterion = parts.model, parts.criterion
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        order = torch.randperm(len(parts.dataset.train), generator=torch.Generator().manual_seed(0))
        chunks = order[: size * 64].split(size)
        fetched = [parts.dataset.train.batch(chunk) for chunk in chunks if len(chunk) == size]
        self.batches: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(
            [(data.to(device), target.to(device)) for data, target in fetched]
        )


class Bare:
    """As written by hand: autocast, GradScaler under FP16, clip_grad_norm_, fused AdamW; no metrics."""

    def __init__(self, work: str, precision: str, device: torch.device) -> None:
        self.parts, self.device = Parts(work, device), device
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.region = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def run(self, steps: int) -> None:
        model, optimizer, scaler = self.parts.model, self.parts.optimizer, self.scaler
        for data, target in itertools.islice(self.parts.batches, steps):
            optimizer.zero_grad()
            with self.region():
                loss = self.parts.criterion(model(data), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()


class Ours:
    """The library with the full record of every step."""

    def __init__(self, work: str, precision: str, device: torch.device, **setup: Any) -> None:
        self.parts = Parts(work, device)
        config = MixedPrecisionConfig(**PRECISION[precision], max_grad_norm=MAX_GRAD_NORM)
        self.trainer = MixedPrecisionTrainer(config)
        self.trainer.on_event = self._take
        self.trainer.setup_training(self.parts.model, self.parts.optimizer, self.parts.criterion, **setup)

    def run(self, steps: int) -> None:
        for batch in itertools.islice(self.parts.batches, steps):
            self.trainer.train_step(*batch)
        self.trainer.flush()

    def _take(self, event: Any) -> None:
        if event.data.get("code", "").endswith("_unavailable"):
            raise RuntimeError(event.message)


LOOPS: dict[str, Callable[..., Any]] = {
    BASE: Bare,
    "ours, eager": Ours,
    "ours, captured": partial(Ours, capture="auto"),
    "ours, compiled": partial(Ours, compile="default"),
    "ours, compiled and captured": partial(Ours, capture="auto", compile="default"),
}


def finish(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device has done it."""
    finish(device)
    began = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - began


def measure(report: Report, work: str, precision: str, device: torch.device, arguments: Any) -> None:
    """Interleaved rounds of every loop of one comparison."""
    place = f"{work}/{precision}/{device.type}"
    loops = {}
    for name in arguments.loops:
        loops[name] = LOOPS[name](work, precision, device)
        first = timed(partial(loops[name].run, 1), device)
        if "compiled" in name:
            report.add(f"{place}/{name}/first step", [first], unit="s", better="neither")
        loops[name].run(_WARM_UP)
    steps = max(32, 32 * round(arguments.block_seconds / timed(partial(loops[BASE].run, 32), device)))
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name in order.sample(list(loops), len(loops)):
            taken[name].append(timed(partial(loops[name].run, steps), device) / steps)
    base = taken.pop(BASE)
    report.add(f"{place}/{BASE}", [1e3 * seconds for seconds in base], unit="ms/step", better="neither")
    for name, values in taken.items():
        ratios = [value / bare for value, bare in zip(values, base, strict=True)]
        report.add(f"{place}/{name}", ratios, unit="ratio", better="lower")


def main() -> None:
    """Command line."""
    parser = options("graph", __doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["mlp", "gpt"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISION, default=["bf16", "fp16"])
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--block-seconds", type=float, default=0.2, help="of the bare loop in one round")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.graph: no CUDA device on this machine, so there is no graph to measure; see --help")
        return
    torch.set_num_threads(arguments.threads)
    logging.getLogger("halfstep.worker.amp").setLevel(logging.ERROR)
    report = Report("graph", {name: value for name, value in vars(arguments).items() if name != "out"})
    for work in arguments.works:
        for precision in arguments.precisions:
            measure(report, work, precision, device, arguments)
    report.write(arguments.out)


if __name__ == "__main__":
    main()
