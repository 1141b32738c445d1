"""What is printed cannot move the terminal's cursor or turn its lines around, wherever it came from."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from halfstep.service.cli.live import LiveView
from halfstep.service.cli.render import Terminal, jobs_table
from tests.cli.test_client import JOB, STATS

HOSTILE = "row\x9b2J\x85\u202ename\u2028\x1b[2J"
RAW = {"\x9b", "\x85", "\u202e", "\u2028"}


def printed(what: object, *, force_terminal: bool = False) -> str:
    file = io.StringIO()
    terminal = Terminal(file=file, width=200, force_terminal=force_terminal)
    terminal.print(what)
    return file.getvalue()


def hostile_view() -> LiveView:
    view = LiveView(Terminal(file=io.StringIO(), width=200))
    view.show(STATS, {**JOB, "name": HOSTILE})
    return view


@pytest.mark.parametrize(
    "what",
    [HOSTILE, Text(HOSTILE), jobs_table([{**JOB, "name": HOSTILE, "tags": {"k": HOSTILE}}]), hostile_view()],
    ids=["text", "styled text", "table", "live view"],
)
def test_what_others_wrote_is_shown_escaped(what: object) -> None:
    text = printed(what)
    assert not RAW & set(text)
    assert "\x1b" not in text
    assert r"row\x9b2J\x85\u202en" in text  # a narrow column cuts the rest off


def test_styles_of_our_own_stay() -> None:
    table = Table(title="[bold]jobs[/bold]")
    table.add_column(Text("a", style="red"))
    assert "\x1b[" in printed(table, force_terminal=True)
