"""Dispatcher: what makes a broker's forgetting and a worker's death harmless, as a list of duties.

A loop goes through the duties of `loop.DUTIES` on a timer; each is a file here with one function that takes a
`Round`. All of them are compare-and-set, so any number of dispatchers may run at once. What acts on events,
and must not miss one, is a consumer (`consuming`). `python -m halfstep.service.dispatch` starts the loop.
"""

from halfstep.service.dispatch.loop import one_round, run

__all__ = ["one_round", "run"]
