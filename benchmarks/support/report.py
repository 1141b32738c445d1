"""What every benchmark writes: named figures with all their values, and the machine they were taken on.

One JSON file a run, so that `compare` can tell what became slower. Imports no torch: a benchmark of the API
must not load it; where the caller has, its build is told too.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
RESULTS = Path(__file__).parents[1] / "results"

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity.

    Attributes:
        name: what was measured, from the general to the particular: "mlp/1 thread/full record".
        unit: of each value; "ratio" for one that travels between machines.
        better: which way is an improvement; "neither" is shown and never judged.
        values: every repetition, at least one.
    """

    name: str
    unit: str
    better: Better
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(map(math.isfinite, self.values)):
            raise ValueError(f"{self.name}: needs finite values, has {self.values}")

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Distance between the quartiles; 0 of a single value."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return high - low


class Report:
    """The figures of one benchmark run.

    Args:
        benchmark: its module's name.
        settings: what it was run with.
    """

    def __init__(self, benchmark: str, settings: Mapping[str, Any]) -> None:
        self.benchmark, self.settings = benchmark, dict(settings)
        self.figures: dict[str, Figure] = {}
        self.machine = machine()
        self._began = time.monotonic()

    def add(self, name: str, values: Sequence[float], *, unit: str, better: Better) -> Figure:
        """Keep a figure and print it."""
        if name in self.figures:
            raise ValueError(f"{name}: measured twice")
        figure = Figure(name, unit, better, tuple(float(value) for value in values))
        self.figures[name] = figure
        print(line(figure), flush=True)
        return figure

    def write(self, path: Path, *, add: bool = False) -> None:
        """One JSON document, replaced as a whole.

        `add`: figures that the file has already, and this run did not take, stay; `parts` tells of both runs.
        """
        head = {
            "command": f"python -m benchmarks.{self.benchmark} {' '.join(sys.argv[1:])}".rstrip(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(time.monotonic() - self._began),
            "machine": self.machine,
            "settings": self.settings,
        }
        figures, parts = self.figures, [head]
        if add and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            figures = read(path) | figures
            earlier = before["parts"] if "parts" in before else [{name: before[name] for name in head}]
            parts = [*earlier, head]
        document = {
            "format": FORMAT,
            "benchmark": self.benchmark,
            **(head if len(parts) == 1 else {"parts": parts}),
            "figures": [asdict(figure) for figure in figures.values()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
        print(f"written to {path}")


def line(figure: Figure) -> str:
    """A figure for the terminal: median, quartile distance, repetitions."""
    spread = f" ± {figure.spread:.3g}" if len(figure.values) > 1 else ""
    return f"{figure.name:<60} {figure.median:>12.5g}{spread} {figure.unit}  (n={len(figure.values)})"


def read(path: Path) -> dict[str, Figure]:
    """The figures of a run, by name.

    Raises:
        ValueError: the file is not of this format.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result in format {FORMAT}")
    figures = [Figure(**(entry | {"values": tuple(entry["values"])})) for entry in document["figures"]]
    return {figure.name: figure for figure in figures}


def options(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks understand: `--out`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=description)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{benchmark}.json", help="the JSON file")
    return parser


def machine() -> dict[str, Any]:
    """What the figures are taken on."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    found = {
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "python": platform.python_version(),
        "device": _processor(),
        "cores": os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        capability = torch.backends.cpu.get_cpu_capability()
        found |= {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{_processor()}, {capability}",
            "threads": torch.get_num_threads(),
        }
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [entry.partition(":")[2].strip() for entry in lines if entry.startswith("model name")]
    return names[0] if names else platform.processor()
