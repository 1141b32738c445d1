"""How things look in the terminal: numbers, tables, the server's problems. No HTTP here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import IO, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from halfstep.service.client.http import ServerRefused
from halfstep.service.contract.answers import Series
from halfstep.service.contract.text import shown

STATE_STYLES = {
    "queued": "yellow", "starting": "cyan", "running": "bold cyan", "pausing": "yellow", "paused": "yellow",
    "cancelling": "magenta", "succeeded": "bold green", "failed": "bold red", "cancelled": "magenta",
}  # fmt: skip
ABSENT = "—"


class Terminal(Console):
    """A console of rich's that shows unseen characters of whatever is printed as backslash escapes.

    Args:
        stderr: write to standard error instead of standard output.
        file: write to this instead.
        width: columns, at least 1; None: as many as there are.
        force_terminal: True: write as to a terminal, whatever the output is.
    """

    def __init__(
        self,
        *,
        stderr: bool = False,
        file: IO[str] | None = None,
        width: int | None = None,
        force_terminal: bool | None = None,
    ) -> None:
        super().__init__(
            highlight=False, stderr=stderr, file=file, width=width, force_terminal=force_terminal
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed, in pieces; styles and cursor movements of our own are not text, and stay."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(shown(segment.text), segment.style)


def number(value: object, digits: int = 4) -> str:
    """A measured value: `NaN` and `Infinity` as they come, absent as a dash, else some significant digits."""
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def size(value: object) -> str:
    """Bytes in binary units."""
    if not isinstance(value, int | float):
        return number(value)
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(value: object) -> str:
    """Seconds as people say them."""
    if not isinstance(value, int | float):
        return number(value)
    if value < 10:
        return f"{value:.1f} s"
    seconds = round(value)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def percent(value: object) -> str:
    """A share from 0 to 1."""
    return f"{value:.1%}" if isinstance(value, int | float) else number(value)


def state(value: object) -> Text:
    """A job's state in its colour."""
    return Text(str(value), style=STATE_STYLES.get(str(value), ""))


def moment(value: object) -> datetime | None:
    """An RFC 3339 time of the service."""
    if not isinstance(value, str):
        return None
    return datetime.fromisoformat(value)


LEVEL_STYLES = {"error": "red", "warning": "yellow", "debug": "dim"}


def event_line(event: Mapping[str, Any]) -> Text:
    """One event of any job: when, which job, what, and who did it."""
    at = moment(event.get("at"))
    actor = event.get("actor") or {}
    line = Text.assemble(
        (f"{at.astimezone():%Y-%m-%d %H:%M:%S}" if at else ABSENT, "dim"),
        f" {event.get('job_id')} ",
        (f"{event.get('type')} ", "bold"),
        (str(event.get("message")), LEVEL_STYLES.get(str(event.get("level")), "")),
    )
    if who := actor.get("name") or actor.get("kind"):
        line.append(f" ({who})", style="dim")
    return line


def run_seconds(job: Mapping[str, Any]) -> float | None:
    """From the job's first start to its end, or to now."""
    start = moment(job.get("started_at"))
    if start is None:
        return None
    return max(0.0, ((moment(job.get("finished_at")) or datetime.now(UTC)) - start).total_seconds())


def problem(error: ServerRefused) -> RenderableType:
    """The server's refusal: what it says, then each wrong place."""
    title = Text.assemble((f"{error.status} {error.title}", "bold red"))
    detail = str(error)
    lines: list[RenderableType] = [
        title if detail == error.title else title.append(f": {detail}", style="default")
    ]
    lines.extend(
        Text.assemble("  ", (each.pointer or "/", "bold"), "  ", each.detail) for each in error.problems
    )
    if error.status == HTTPStatus.UNAUTHORIZED:
        lines.append(
            Text("give a key by HALFSTEP_API_KEY or --key; `halfstep keys create` makes one", style="dim")
        )
    return Group(*lines)


def print_wide(table: Table) -> None:
    """Print all of a table: cut off at the window's edge it would lose numbers, wide it only wraps."""
    console = Terminal()
    console.width = max(
        console.width, console.measure(table, options=console.options.update(max_width=500)).maximum
    )
    console.print(table)


def jobs_table(items: Sequence[Mapping[str, Any]]) -> Table:
    """One line a job."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True)
    table.add_column("name", overflow="ellipsis", max_width=24, no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("step", "loss", "overflows", "created"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in items:
        stats = job.get("stats") or {}
        created = moment(job.get("created_at"))
        table.add_row(
            str(job["id"]),
            Text(shown(str(job.get("name", "")))),
            state(job.get("state")),
            steps(stats),
            number(stats.get("loss")),
            number(stats.get("overflow_count")),
            created.astimezone().strftime("%m-%d %H:%M:%S") if created else ABSENT,
        )
    return table


def series_table(items: Sequence[Series]) -> Table:
    """One line a series."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "points", "first step", "last step", "last value"):
        table.add_column(title, justify="left" if title == "name" else "right", no_wrap=True)
    for each in items:
        figures = (each.count, each.first_step, each.last_step, each.last_value)
        table.add_row(Text(shown(each.name)), *map(number, figures))
    return table


def checkpoints_table(items: Sequence[Mapping[str, Any]]) -> Table:
    """One line a checkpoint."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("step", "size", "loss", "created"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("sha256", no_wrap=True)
    for kept in items:
        created = moment(kept.get("created_at"))
        table.add_row(
            str(kept["step"]),
            size(kept.get("bytes")),
            number((kept.get("metrics") or {}).get("loss")),
            created.astimezone().strftime("%m-%d %H:%M:%S") if created else ABSENT,
            str(kept.get("sha256", "")),
        )
    return table


def steps(stats: Mapping[str, Any]) -> str:
    """`120/450`, or `120` where the length is not known."""
    current, total = stats.get("current_step"), stats.get("total_steps")
    if current is None:
        return ABSENT
    return f"{current}/{total}" if total is not None else str(current)


def stats_table(stats: Mapping[str, Any], job: Mapping[str, Any]) -> Table:
    """Everything a person asks about one job, in two columns."""
    precision = stats.get("precision") or {}
    speed = stats.get("performance_metrics") or {}
    step_time = speed.get("step_time_ms") or {}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(label: str, value: RenderableType) -> None:
        table.add_row(label, Text(value) if isinstance(value, str) else value)

    row("job", f"{job.get('name', '')}  {stats.get('job_id', '')}")
    row("state", state(stats.get("state")))
    if reason := job.get("status_reason"):
        row("reason", f"{reason.get('code')}: {reason.get('message')}")
    row("steps", _progress(stats))
    for label, value in _evaluation(stats):
        row(label, value)
    row("loss", f"{number(stats.get('loss'))} (epoch average {number(stats.get('average_loss'))})")
    row("learning rate", number(stats.get("learning_rate")))
    row("gradient norm", number(stats.get("grad_norm")))
    row(
        "precision",
        " ".join(
            str(precision[key]) for key in ("mode", "precision_level", "compute_dtype") if precision.get(key)
        ),
    )
    row(
        "loss scale",
        f"{number(stats.get('current_scale'), 8)} (average {number(stats.get('average_scale'))})",
    )
    row("overflows", _overflows(stats))
    if last := stats.get("last_overflow"):
        row(
            "last overflow",
            f"step {last.get('step')}, {last.get('kind')}, layer {last.get('layer') or ABSENT}",
        )
    row("NaN steps", number(stats.get("nan_count")))
    row(
        "underflows",
        f"{number(stats.get('underflow_count'))} (estimate {number(stats.get('underflow_estimate'))})",
    )
    row("skipped steps", number(stats.get("skipped_steps")))
    memory = f"{size(stats.get('memory_allocated_bytes'))}, peak {size(stats.get('memory_peak_bytes'))}"
    row("memory", f"{memory}, {percent(stats.get('memory_usage'))} of the device")
    row(
        "speed",
        f"{number(speed.get('steps_per_second'))} steps/s, "
        f"{number(speed.get('samples_per_second'))} samples/s",
    )
    row(
        "step time",
        ", ".join(f"{name} {number(step_time.get(name))} ms" for name in ("p50", "p95", "max")),
    )
    row("time", _time(stats, job))
    return table


def _progress(stats: Mapping[str, Any]) -> str:
    text = steps(stats)
    if isinstance(stats.get("progress"), int | float):
        text += f" ({percent(stats['progress'])})"
    return f"{text}, epoch {number(stats.get('epoch'))}, attempt {number(stats.get('attempt'))}"


def _evaluation(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    evaluation = stats.get("evaluation")
    if not evaluation:
        return []
    split = evaluation.get("split", "held-out")
    rows = [(f"{name} ({split})", number(value)) for name, value in (evaluation.get("metrics") or {}).items()]
    return [*rows, (f"loss ({split})", f"{number(evaluation.get('loss'))} at step {evaluation.get('step')}")]


def _overflows(stats: Mapping[str, Any]) -> str:
    count, rate = number(stats.get("overflow_count")), stats.get("overflow_rate")
    return count if rate is None else f"{count} (rate {number(rate)})"


def _time(stats: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    text = duration(run_seconds(job))
    if not stats.get("is_terminal") and stats.get("eta_seconds") is not None:
        text += f", {duration(stats['eta_seconds'])} to go"
    return text
