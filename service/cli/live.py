"""Views of a job that is followed: live in a terminal, plain lines elsewhere, JSON lines for programs."""

import json
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from halfstep.service.cli.render import duration, number, percent, run_seconds, size, state, steps
from halfstep.service.client.watching import View

PLAIN_SECONDS = 5.0  # at most one plain line in this time, state changes aside


def view_for(console: Console, *, as_json: bool) -> View:
    """The view that suits where the output goes."""
    if as_json:
        return JsonLines()
    return LiveView(console) if console.is_terminal else PlainLines(console)


class JsonLines:
    """One line of JSON for each change: the stats document, as the service sent it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def show(self, stats: Mapping[str, Any], job: Mapping[str, Any]) -> None:  # noqa: ARG002  # part of View
        """Print the stats."""
        print(json.dumps(stats), flush=True)

    def away(self, why: str) -> None:
        """Nothing: lines on standard output are stats only."""


class PlainLines:
    """A line now and then, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state = ""
        self._last = 0.0
        self._away = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def show(self, stats: Mapping[str, Any], job: Mapping[str, Any]) -> None:  # noqa: ARG002  # part of View
        """Print a line if the state changed or the last one is some seconds old."""
        self._away = False
        now = time.monotonic()
        if stats.get("state") == self._state and now - self._last < PLAIN_SECONDS:
            return
        self._state, self._last = str(stats.get("state")), now
        speed = (stats.get("performance_metrics") or {}).get("steps_per_second")
        self._say(
            f"{self._state} step {steps(stats)} loss {number(stats.get('loss'))} "
            f"scale {number(stats.get('current_scale'), 8)} "
            f"overflows {number(stats.get('overflow_count'))} skipped {number(stats.get('skipped_steps'))} "
            f"memory {size(stats.get('memory_allocated_bytes'))} {number(speed, 3)} steps/s"
            + ("" if stats.get("is_terminal") else f" eta {duration(stats.get('eta_seconds'))}")
        )

    def away(self, why: str) -> None:
        """Say so once."""
        if not self._away:
            self._say(f"waiting: {why}")
        self._away = True

    def _say(self, text: str) -> None:
        self._console.print(
            f"{datetime.now().astimezone():%H:%M:%S} {text}", soft_wrap=True, markup=False, highlight=False
        )


class LiveView:
    """A progress bar and the numbers that matter, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._stats: Mapping[str, Any] = {}
        self._job: Mapping[str, Any] = {}
        self._away = ""
        self._live = Live(self, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._live.stop()

    def show(self, stats: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        """Draw these from now on."""
        self._stats, self._job, self._away = stats, job, ""

    def away(self, why: str) -> None:
        """Say so under the numbers, until the next ones come."""
        self._away = why

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stats = self._stats
        if not stats:
            yield Text(self._away or "asking the service …", style="dim")
            return
        yield Group(self._headline(stats), _bar(stats), _figures(stats))
        reason = self._job.get("status_reason")
        if reason:
            yield Text(f"{reason.get('code')}: {reason.get('message')}", style="red")
        if self._away:
            yield Text(f"waiting: {self._away}", style="yellow")

    def _headline(self, stats: Mapping[str, Any]) -> Text:
        text = Text.assemble((str(self._job.get("name", "")), "bold"), "  ", state(stats.get("state")))
        if (stats.get("attempt") or 1) > 1:
            text.append(f"  attempt {stats['attempt']}", style="yellow")
        if worker := self._job.get("worker"):
            text.append(f"  on {worker}", style="dim")
        elapsed = run_seconds(self._job)
        if elapsed is not None:
            text.append(f"  {duration(elapsed)}", style="dim")
        return text


def _bar(stats: Mapping[str, Any]) -> Table:
    line = Table.grid(padding=(0, 1))
    progress = stats.get("progress")
    known = isinstance(progress, int | float)
    pulse = not known and not stats.get("is_terminal")
    bar = ProgressBar(total=1.0, completed=progress or 0.0, width=40, pulse=pulse)
    line.add_row(
        bar,
        percent(progress) if known else "",
        f"step {steps(stats)}",
        f"epoch {number(stats.get('epoch'))}",
        "" if stats.get("is_terminal") else f"eta {duration(stats.get('eta_seconds'))}",
    )
    return line


def _figures(stats: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    speed = stats.get("performance_metrics") or {}
    grid.add_row(*_cells(
        ("loss", number(stats.get("loss"))), ("scale", number(stats.get("current_scale"), 8)),
        ("overflows", number(stats.get("overflow_count"))), ("skipped", number(stats.get("skipped_steps"))),
        ("NaN", number(stats.get("nan_count"))),
    ))  # fmt: skip
    grid.add_row(*_cells(
        ("average", number(stats.get("average_loss"))), ("lr", number(stats.get("learning_rate"))),
        ("memory", size(stats.get("memory_allocated_bytes"))),
        ("steps/s", number(speed.get("steps_per_second"), 3)),
        *_scores(stats),
    ))  # fmt: skip
    return grid


def _scores(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metrics = (stats.get("evaluation") or {}).get("metrics") or {}
    for name, value in list(metrics.items())[:1]:
        yield f"held-out {name}", number(value)


def _cells(*pairs: tuple[str, str]) -> Iterator[Text]:
    for label, value in pairs:
        yield Text.assemble((f"{label} ", "dim"), (value, "bold"))
