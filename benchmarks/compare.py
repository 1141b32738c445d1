"""What became slower between two runs of the benchmarks, beyond their noise.

`python -m benchmarks.compare OLD NEW`: two JSON files, or two directories of them. Exits with 1 where
something got worse, with 2 where nothing could be compared.

A figure is worse when its median moved the wrong way by more than `--tolerance` *and* by more than three
standard errors, estimated from the spread of both runs. A figure with fewer than five values in either run
has no spread to speak of: there the tolerance is three times as wide. Absolute figures are comparable on
one and the same quiet machine only; ratios travel.
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.report import Figure, read

_ENOUGH = 5
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True, slots=True)
class Change:
    """How a figure moved: `factor` is new over old, `worse` and `better` say whether that is beyond noise."""

    old: Figure
    new: Figure
    factor: float
    worse: bool
    better: bool


def judge(old: Figure, new: Figure, *, tolerance: float) -> Change:
    """Compare two measurements of the same figure.

    Args:
        old, new: their `better` says which way is an improvement.
        tolerance: relative change that is always allowed, such as 0.05.
    """
    if not old.median:
        return Change(old, new, math.inf if new.median else 1.0, worse=False, better=False)
    change = (new.median - old.median) / abs(old.median)
    allowed = tolerance
    if min(len(old.values), len(new.values)) < _ENOUGH:
        allowed *= 3
    else:
        error = math.hypot(_error_of_median(old), _error_of_median(new))
        allowed = max(allowed, _STANDARD_ERRORS * error / abs(old.median))
    direction = {"lower": 1, "higher": -1, "neither": 0}[old.better]
    return Change(
        old, new, 1 + change, worse=direction * change > allowed, better=-direction * change > allowed
    )


def _error_of_median(figure: Figure) -> float:
    """Standard error of a median, by the median absolute deviation, which a single outlier does not move."""
    deviation = statistics.median(abs(value - figure.median) for value in figure.values)
    return 1.2533 * 1.4826 * deviation / math.sqrt(len(figure.values))


def figures_of(path: Path) -> dict[str, Figure]:
    """The figures of a file, or of every result in a directory, named by their file."""
    if not path.is_dir():
        return read(path)
    found: dict[str, Figure] = {}
    for each in sorted(path.glob("*.json")):
        try:
            figures = read(each)
        except ValueError:
            continue  # a result in a format of its own, such as the accuracy table
        found |= {f"{each.stem}: {name}": figure for name, figure in figures.items()}
    return found


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05)
    arguments = parser.parse_args()
    old, new = figures_of(arguments.old), figures_of(arguments.new)
    common = [name for name in old if name in new]
    if not common:
        print(f"{arguments.old} and {arguments.new} have no figure in common", file=sys.stderr)
        return 2
    changes = {name: judge(old[name], new[name], tolerance=arguments.tolerance) for name in common}
    for name, change in changes.items():
        if change.worse or change.better:
            verdict = "WORSE " if change.worse else "better"
            print(
                f"{verdict} {name}: {change.old.median:.5g} -> {change.new.median:.5g} {change.new.unit} "
                f"({change.factor:.2f} x)"
            )
    for name in sorted(old.keys() ^ new.keys()):
        print(f"only in the {'old' if name in old else 'new'} run: {name}")
    worse = sum(change.worse for change in changes.values())
    print(f"{len(common)} figures compared, {worse} worse beyond noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
