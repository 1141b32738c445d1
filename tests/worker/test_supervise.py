"""The loop that watches one job's process: who may stop it, when it is ended, and by which signal."""

import queue
import signal
import threading
import time

import pytest

from halfstep.worker.host.process import Exited
from halfstep.worker.host.supervision import Ending, Graces, LeaseLost, StopRequested, supervise
from halfstep.worker.protocol import Done, Progress, StopOrder

SOON = 10.0  # how long a test waits for what must happen at once


class Child:
    """A process as the supervision sees it: it dies of the signals in `mortal_to`."""

    def __init__(self, mortal_to: set[signal.Signals] | None = None) -> None:
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.orders: list[object] = []
        self.signals: list[signal.Signals] = []
        self.mortal_to = {signal.SIGTERM, signal.SIGKILL} if mortal_to is None else mortal_to
        self.first_steps: list[bool] = []
        self.last_words = "Segmentation fault"

    def order(self, message: object) -> bool:
        self.orders.append(message)
        return True

    def signal_group(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number in self.mortal_to:
            self.inbox.put(Exited(-number))


class Keeper:
    def __init__(self, lease_left: float = 3600.0) -> None:
        self.deadline = time.monotonic() + lease_left


def run(
    child: Child, keeper: Keeper | None = None, graces: Graces | None = None, stall: float = 3600.0
) -> Ending:
    box: list[Ending] = []
    thread = threading.Thread(
        target=lambda: box.append(
            supervise(
                child,  # type: ignore[arg-type]
                keeper or Keeper(),  # type: ignore[arg-type]
                graces=graces or Graces(),
                stall_seconds=stall,
                on_first_step=lambda: child.first_steps.append(True),
            )
        ),
        daemon=True,
    )
    thread.start()
    thread.join(SOON)
    assert box, "the supervision did not end"
    return box[0]


def test_a_job_that_says_how_it_ended_is_believed() -> None:
    child = Child()
    done = Done(outcome="finished", step=9)
    for item in (*(Progress(step=n, step_seconds=0.01) for n in (0, 3, 9)), done, Exited(0)):
        child.inbox.put(item)
    ending = run(child)
    assert child.first_steps == [True]
    assert ending.done == done
    assert (ending.killed_for, ending.last_step, child.signals) == (None, 9, [])


def test_a_process_that_dies_silently_leaves_its_last_words() -> None:
    child = Child()
    child.inbox.put(Progress(step=4, step_seconds=0.01))
    child.inbox.put(Exited(-11))
    ending = run(child)
    assert ending.done is None
    assert (ending.returncode, ending.last_step, ending.last_words) == (-11, 4, "Segmentation fault")


@pytest.mark.parametrize("why", ["cancel", "pause", "drain"])
def test_a_request_is_asked_first_and_enforced_after_its_grace(why: str) -> None:
    child = Child(mortal_to={signal.SIGKILL})
    child.inbox.put(StopRequested(why))  # type: ignore[arg-type]
    ending = run(child, graces=Graces(cancel=0.05, pause=0.05, drain=0.05))
    assert child.orders == [StopOrder(why=why)]  # type: ignore[arg-type]
    assert child.signals == [signal.SIGTERM, signal.SIGKILL]
    assert ending.killed_for == why


def test_a_request_that_is_obeyed_costs_no_signal() -> None:
    child = Child()
    child.inbox.put(StopRequested("cancel"))
    child.inbox.put(Done(outcome="cancel", step=3))
    child.inbox.put(Exited(0))
    ending = run(child)
    assert (ending.killed_for, child.signals) == (None, [])


def test_a_cancel_overrides_a_drain_and_is_overridden_by_nothing() -> None:
    child = Child()
    for why in ("drain", "cancel", "pause", "drain"):
        child.inbox.put(StopRequested(why))  # type: ignore[arg-type]
    child.inbox.put(Exited(0))
    run(child)
    assert child.orders == [StopOrder(why="drain"), StopOrder(why="cancel")]


def test_a_lost_lease_kills_at_once() -> None:
    child = Child()
    child.inbox.put(LeaseLost("another attempt owns the job"))
    ending = run(child)
    assert child.signals == [signal.SIGKILL]
    assert ending.killed_for == "lost"


def test_the_deadman_kills_when_no_renewal_came_in_time() -> None:
    child = Child()
    ending = run(child, Keeper(lease_left=0.05))
    assert child.signals == [signal.SIGKILL]
    assert ending.killed_for == "lost"


def test_a_process_without_progress_is_stalled() -> None:
    child = Child()
    child.inbox.put(Progress(step=7, step_seconds=0.001))
    ending = run(child, stall=0.1)
    assert child.signals == [signal.SIGTERM]
    assert (ending.killed_for, ending.last_step) == ("stalled", 7)


def test_slow_steps_are_no_stall() -> None:
    child = Child()
    child.inbox.put(Progress(step=1, step_seconds=10.0))
    threading.Timer(0.3, lambda: child.inbox.put(Exited(0))).start()
    assert run(child, stall=0.05).killed_for is None
