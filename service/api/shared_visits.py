"""Many requests, one visit to the database: those that come while one is under way share the next.

A request of its own costs a hop to a thread, a transaction and, for a write, a wait for the disk. Shared,
these cost as much for sixteen as for one; and a request that comes alone waits for nobody.
"""

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

MOST_AT_ONCE = 64

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class SharedVisits(Generic[Question, Answer]):
    """Puts questions that come at the same time to one function. Lives on one event loop.

    Args:
        visit: Called in a thread, once at a time, after the questions it gets were asked. Gives an answer to
            each, in their order; an exception in its place is raised where that question was asked, and one
            that it raises everywhere.
        most: Questions of one visit.
    """

    def __init__(
        self, visit: Callable[[Sequence[Question]], Sequence[Answer | Exception]], *, most: int = MOST_AT_ONCE
    ) -> None:
        self._visit, self._most = visit, most
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._visits: asyncio.Task[None] | None = None
        # A visit belongs to no single request: what is logged in it must not carry the id of one.
        self._context = contextvars.copy_context()

    async def ask(self, question: Question) -> Answer:
        """The answer of a visit that begins after this call."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._visits is None or self._visits.done():
            self._visits = asyncio.create_task(self._go(), name="visits", context=self._context)
        return await answer

    async def _go(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            answers: Sequence[Answer | Exception]
            try:
                answers = await run_in_threadpool(self._visit, [question for question, _ in asked])
                if len(answers) != len(asked):
                    raise RuntimeError(f"{len(answers)} answers to {len(asked)} questions")
            except Exception as error:  # noqa: BLE001  # raised where each of them waits
                answers = [error] * len(asked)
            for (_, future), answer in zip(asked, answers, strict=True):
                if future.done():  # whoever asked has gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
