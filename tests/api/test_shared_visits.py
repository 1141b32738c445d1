"""Questions that come at the same time are put together."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest
import structlog

from halfstep.service.api.shared_visits import SharedVisits

T = TypeVar("T")


class Visits:
    """Answers each number with its double, odd ones above ten with an error; held until it may go on."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.go_on = threading.Event()
        self.fails = False

    def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.asked.append(list(numbers))
        assert self.go_on.wait(10)
        if self.fails:
            raise ConnectionError("away")
        return [ValueError(number) if number > 10 and number % 2 else 2 * number for number in numbers]


def finished(work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to; who waits for an answer that never comes fails."""

    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


async def _begun(visits: Visits, together: SharedVisits[int, int]) -> "asyncio.Task[int]":
    """A question whose visit is under way."""
    first = asyncio.create_task(together.ask(1))
    while not visits.asked:
        await asyncio.sleep(0.001)
    return first


def test_what_comes_during_a_visit_shares_the_next() -> None:
    visits = Visits()

    async def run() -> list[int]:
        together: SharedVisits[int, int] = SharedVisits(visits, most=3)
        first = await _begun(visits, together)
        others = [asyncio.create_task(together.ask(number)) for number in (2, 3, 4, 5)]
        await asyncio.sleep(0.01)
        assert visits.asked == [[1]]
        visits.go_on.set()
        return list(await asyncio.gather(first, *others))

    assert finished(run()) == [2, 4, 6, 8, 10]
    assert visits.asked == [[1], [2, 3, 4], [5]]


def test_an_error_is_raised_where_its_question_was_asked() -> None:
    visits = Visits()

    async def run() -> list[int | BaseException]:
        together: SharedVisits[int, int] = SharedVisits(visits)
        first = await _begun(visits, together)
        others = [asyncio.create_task(together.ask(number)) for number in (12, 13, 14)]
        await asyncio.sleep(0)
        visits.go_on.set()
        await first
        return await asyncio.gather(*others, return_exceptions=True)

    fine, wrong, fine_too = finished(run())
    assert (fine, fine_too) == (24, 28)
    assert isinstance(wrong, ValueError)


def test_a_visit_that_fails_fails_for_all_of_it_and_the_next_works() -> None:
    visits = Visits()
    visits.fails = True
    visits.go_on.set()

    async def run() -> int:
        together: SharedVisits[int, int] = SharedVisits(visits)
        answers = await asyncio.gather(*(together.ask(number) for number in (1, 2)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionError, ConnectionError]
        visits.fails = False
        return await together.ask(3)

    assert finished(run()) == 6


def test_a_visit_that_leaves_one_out_fails_for_all_of_it() -> None:
    async def run() -> list[int | BaseException]:
        together: SharedVisits[int, int] = SharedVisits(lambda numbers: list(numbers[1:]))
        return await asyncio.gather(*(together.ask(number) for number in (1, 2)), return_exceptions=True)

    assert [str(answer) for answer in finished(run())] == ["1 answers to 2 questions"] * 2


def test_who_leaves_takes_no_answer_from_others() -> None:
    visits = Visits()

    async def run() -> int:
        together: SharedVisits[int, int] = SharedVisits(visits)
        first = await _begun(visits, together)
        leaver, stayer = (asyncio.create_task(together.ask(number)) for number in (2, 3))
        await asyncio.sleep(0)
        first.cancel()
        leaver.cancel()
        visits.go_on.set()
        return await stayer

    assert finished(run()) == 6


def test_a_visit_carries_no_requests_id() -> None:
    seen: list[object] = []

    def visit(numbers: Sequence[int]) -> list[int | Exception]:
        seen.append(structlog.contextvars.get_contextvars().get("request_id"))
        return list(numbers)

    async def run() -> None:
        together: SharedVisits[int, int] = SharedVisits(visit)
        with structlog.contextvars.bound_contextvars(request_id="r-1"):
            await together.ask(1)

    finished(run())
    assert seen == [None]


@pytest.mark.parametrize("most", [1, 2])
def test_no_visit_gets_more_than_it_may(most: int) -> None:
    visits = Visits()
    visits.go_on.set()

    async def run() -> list[int]:
        together: SharedVisits[int, int] = SharedVisits(visits, most=most)
        return list(await asyncio.gather(*(together.ask(number) for number in range(5))))

    assert finished(run()) == [0, 2, 4, 6, 8]
    assert max(map(len, visits.asked)) == most
