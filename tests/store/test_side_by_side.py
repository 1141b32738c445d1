"""Jobs of equal steps side by side: what one writes, cuts or inherits never touches another one's record."""

from halfstep.service.contract.metrics import StepMetrics
from halfstep.service.store import jobs, record
from halfstep.service.store.sql.database import Database
from tests.store.making import LIVE, claimed, running, steps
from tests.store.test_metrics import assert_equal
from tests.store.test_plots import assert_complete, assert_exact, small_grid

SIZES = (3, 1, 4, 20, 2, 16, 7, 11)  # inside a chunk of 8, to its end, over several


def rows_of(number: int, first: int, last: int) -> list[StepMetrics]:
    """Steps that no other job has."""
    return steps(first, last, loss=1000.0 * number + first, overflow=number == 2, epoch=number + 1)


def test_records_of_the_same_steps_stay_apart(database: Database) -> None:
    with small_grid():
        held = [running(database) for _ in range(3)]
        models: list[list[StepMetrics]] = [[] for _ in held]

        def grow() -> None:
            for size in SIZES:
                for number, (job, model) in enumerate(zip(held, models, strict=True)):
                    rows = rows_of(number, len(model) + 1, len(model) + size)
                    with database.begin() as s:
                        record.append(s, job.id, job.fence, rows, LIVE)
                    model.extend(rows)

        def check() -> None:
            for job, model in zip(held, models, strict=True):
                assert_equal(database, job.id, model, 5)
                assert_complete(database, job.id, len(model))
                for points in (1, 3, 9):
                    assert_exact(database, job.id, model, max_points=points)

        grow()
        check()
        for number, kept in ((0, 45), (1, 32), (2, 21)):
            with database.begin() as s:
                job = held[number]
                jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
            held[number] = job = claimed(database)
            with database.begin() as s:
                jobs.mark_running(s, job.id, job.fence)
                record.truncate_after(s, job.id, job.fence, kept)
            del models[number][kept:]
            check()
        grow()
        check()
        for number, kept in ((0, 50), (1, 64)):
            held.append(running(database))
            with database.begin() as s:
                record.inherit(s, held[-1].id, source_id=held[number].id, step=kept)
            models.append(models[number][:kept])
            check()
