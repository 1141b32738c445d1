"""The fault suite's short form: a few jobs and faults, one seed. `make faults` is the long one."""

from pathlib import Path

import pytest

from tests.faults.run import run, table

FAULTS = (
    "kill worker",
    "flush redis",
    "kill child",
    "postgres cut",
    "freeze worker",
    "kill api after a commit",
    "disk full",
    "truncate a checkpoint",
)


@pytest.mark.e2e
def test_nothing_is_lost_and_nothing_is_wrong(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        database="postgresql",
        count=8,
        faults=FAULTS,
        seed=20,
        workers=2,
        variants=("plain", "scaled"),
    )
    print(table(result.summary()))
    assert not result.violations
    assert sum(fault.hit for fault in result.faults) >= 4
