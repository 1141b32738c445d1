"""The live view in a terminal: what one picture of it says."""

import io
from typing import Any

from rich.console import Console

from halfstep.service.cli.live import LiveView, PlainLines, view_for
from tests.cli.test_client import JOB, STATS


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def picture(stats: dict[str, Any], job: dict[str, Any], *, away: str = "") -> str:
    console = terminal()
    view = LiveView(console)
    view.show(stats, job)
    if away:
        view.away(away)
    console.print(view)
    return text_of(console)


def test_it_shows_what_a_person_asks_first() -> None:
    text = picture(STATS, JOB)
    for figure in (
        "digits [amp]",
        "running",
        "on gpu-1",
        "26.7%",
        "step 120/450",
        "epoch 2",
        "eta 1 min 15 s",
        "loss 0.2131",
        "scale 65536",
        "overflows 3",
        "skipped 5",
        "NaN 2",
        "memory 3.0 GiB",
        "steps/s 123",
        "held-out accuracy 0.9611",
    ):
        assert figure in text, figure


def test_a_job_of_unknown_length_and_one_that_has_not_begun() -> None:
    nothing = dict.fromkeys(STATS) | {"state": "queued", "is_terminal": False, "attempt": 1}
    text = picture(nothing, {**JOB, "state": "queued", "worker": None, "started_at": None})
    assert "queued" in text
    assert "eta —" in text
    endless = {**STATS, "total_steps": None, "progress": None, "eta_seconds": None}
    assert "step 120 " in picture(endless, JOB)


def test_a_failure_and_an_absent_service_are_said() -> None:
    failed = {**JOB, "status_reason": {"code": "worker_lost", "message": "It was lost."}}
    text = picture({**STATS, "attempt": 3}, failed, away="no answer")
    assert "worker_lost: It was lost." in text
    assert "attempt 3" in text
    assert "waiting: no answer" in text


def test_the_bar_follows_the_progress() -> None:
    def done(share: float) -> int:
        console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="truecolor")
        view = LiveView(console)
        view.show({**STATS, "progress": share}, JOB)
        segments = console.render(view)
        # The part that is done is drawn in the colour of rich's own style for it.
        finished = {console.get_style("bar.complete"), console.get_style("bar.finished")}
        return sum(
            len(each.text) for each in segments if each.style in finished and set(each.text) <= {"━", "╸"}
        )

    assert (done(0.0), done(0.5), done(1.0)) == (0, 20, 40)


def test_the_view_suits_the_output() -> None:
    assert isinstance(view_for(terminal(), as_json=False), LiveView)
    assert isinstance(view_for(Console(file=io.StringIO()), as_json=False), PlainLines)


def test_plain_lines_come_with_state_changes_and_not_with_every_number() -> None:
    console = Console(file=io.StringIO(), width=300)
    view = PlainLines(console)
    for state in ("queued", "running", "running", "running", "succeeded"):
        view.show({**STATS, "state": state}, JOB)
    states = [line.split()[1] for line in text_of(console).splitlines()]
    assert states == ["queued", "running", "succeeded"]
