"""One benchmark in two checkouts by turns, and both in one table: what a change costs on this machine.

`python -m benchmarks.versions OLD NEW --benchmark record --rounds 3 -- --databases sqlite --without rows`:
OLD and NEW are checkouts with a `.venv` of their own; what stands after `--` goes to the benchmark. Each
round runs both, in an order that alternates, so that a host which becomes slower meets both alike. A figure's
ratio is that of the two medians within one round; the table shows the median of the rounds' ratios and their
range.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.support.report import Figure, Report, options, read

SIDES = ("old", "new")


def measured(checkout: Path, benchmark: str, arguments: Sequence[str], out: Path) -> dict[str, Figure]:
    """Run a benchmark of a checkout, with its own interpreter, and read its figures.

    Raises:
        subprocess.CalledProcessError: the benchmark failed; it has told why on standard error.
    """
    command = [".venv/bin/python", "-m", f"benchmarks.{benchmark}", "--out", str(out), *arguments]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    return read(out)


def ratios(rounds: Sequence[Mapping[str, Mapping[str, Figure]]]) -> dict[str, list[float]]:
    """New over old of every figure that both sides measured in each round, one ratio a round."""
    shared = set.intersection(*(set(each[side]) for each in rounds for side in SIDES))
    found: dict[str, list[float]] = {}
    for name in rounds[0]["old"]:
        if name in shared and all(each["old"][name].median for each in rounds):
            found[name] = [each["new"][name].median / each["old"][name].median for each in rounds]
    return found


def table(rounds: Sequence[Mapping[str, Mapping[str, Figure]]]) -> str:
    """A Markdown table: the medians of both sides, new over old, and the range of that over the rounds."""
    lines = [
        "| figure | unit | before | after | after / before | range | better |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in ratios(rounds).items():
        figure = rounds[0]["old"][name]
        old, new = (statistics.median(each[side][name].median for each in rounds) for side in SIDES)
        lines.append(
            f"| {name} | {figure.unit} | {old:.4g} | {new:.4g} | {statistics.median(found):.3f} "
            f"| {min(found):.3f} to {max(found):.3f} | {figure.better} |"
        )
    return "\n".join(lines)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is this program's, and what stands after `--`."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def main() -> int:
    """Measure, print the table, write the ratios."""
    parser = options("versions", __doc__)
    parser.add_argument("old", type=Path, help="a checkout of the version before")
    parser.add_argument("new", type=Path, help="a checkout of the version after")
    parser.add_argument("--benchmark", required=True, help="record, overhead, api, latency, …")
    parser.add_argument("--rounds", type=int, default=3, help="at least 1; one run of each side in each")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other benchmarks")
    own, passed_on = _split(sys.argv[1:])
    given = parser.parse_args(own)
    if given.rounds < 1:
        parser.error("--rounds: needs to be at least 1")
    places = {"old": given.old.resolve(), "new": given.new.resolve()}
    rounds: list[dict[str, dict[str, Figure]]] = []
    with tempfile.TemporaryDirectory(prefix="halfstep-versions-") as directory:
        for number in range(given.rounds):
            found = {}
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                out = Path(directory) / f"{side}-{number}.json"
                found[side] = measured(places[side], given.benchmark, passed_on, out)
                print(f"round {number + 1} of {given.rounds}: {side} measured", file=sys.stderr, flush=True)
            rounds.append(found)
    print(table(rounds))
    report = Report(
        "versions", {"benchmark": given.benchmark, "rounds": given.rounds, "arguments": passed_on}
    )
    for name, values in ratios(rounds).items():
        report.add(f"{given.benchmark}/{name}", values, unit="ratio", better=rounds[0]["old"][name].better)
    report.write(given.out, add=given.add)
    return 0


if __name__ == "__main__":
    sys.exit(main())
