"""The outbox's fault run in its short form, on each database, and its checker against made-up deliveries."""

from pathlib import Path

import pytest

from tests.databases import KINDS
from tests.faults.outbox import DELIVERED, IN_ORDER, found, run


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_is_delivered_in_order_whoever_is_killed(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, database=kind, count=2000, writers=4, seed=3, jobs_number=10)
    print(result)
    assert result.violations == ()
    assert result.events == 2010
    assert result.kills >= 2


@pytest.mark.parametrize(
    ("lines", "broken"),
    [
        (["1 a 1", "2 a 2", "3 b 1"], []),
        (["1 a 1", "2 a 2", "1 a 1", "2 a 2", "3 b 1"], []),  # repeats are allowed
        (["1 a 1", "3 b 1"], [DELIVERED]),
        (["2 a 2", "1 a 1", "3 b 1"], [IN_ORDER]),
        ([], [DELIVERED, DELIVERED]),
    ],
)
def test_the_checker_tells_a_loss_and_a_wrong_order(lines: list[str], broken: list[str]) -> None:
    assert [each.invariant for each in found({"a": 2, "b": 1}, lines)] == broken
