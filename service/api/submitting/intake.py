"""Submissions: checked, stored and published together when they come together.

Each is checked for itself and refused for itself. Those that pass are committed in one transaction, and only
then are workers woken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from halfstep.service.api.answers.views import job_document, job_views
from halfstep.service.api.answers.wire import json_bytes
from halfstep.service.api.requests.body import JsonBody
from halfstep.service.api.shared_visits import SharedVisits
from halfstep.service.api.submitting.document import read_spec
from halfstep.service.api.submitting.fleet import Catalogues, Fleet, Submission, prepare
from halfstep.service.contract.answers import DryRun
from halfstep.service.contract.events import Actor
from halfstep.service.errors import StoreUnavailable
from halfstep.service.faultpoints import reach
from halfstep.service.queue import wake_worker
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.job_rows import absent
from halfstep.service.store.sql.database import Database

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks for. With `dry_run` it is checked, and nothing is stored."""

    tenant: str
    actor: Actor
    body: JsonBody
    dry_run: bool
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer's JSON; the job's id, None of a dry run."""

    body: bytes
    job_id: str | None


@dataclass(frozen=True, slots=True)
class _Stored:
    """A job that is committed, and whether its order made it."""

    job_id: str
    body: bytes
    created: bool


class Intake:
    """Takes the orders of one process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._catalogues = Catalogues()
        self._orders: SharedVisits[Order, Taken] = SharedVisits(self._visit)

    async def take(self, order: Order) -> Taken:
        """Check `order`, store its job and wake a worker, in this order.

        Raises:
            InvalidRequest: the specification is not valid, or its key was used with another body.
            StoreUnavailable: the database did not answer; nothing was stored.
        """
        return await self._orders.ask(order)

    def _visit(self, orders: Sequence[Order]) -> list[Taken | Exception]:
        answers: list[Taken | Exception | None] = []
        wanted: dict[int, jobs.NewJob] = {}
        with self._database.read() as session:
            fleet = Fleet(session, self._settings, self._catalogues)
            for index, order in enumerate(orders):
                try:
                    submission = prepare(read_spec(order.body), fleet)
                except SQLAlchemyError:
                    raise
                except Exception as error:  # noqa: BLE001  # a defect that one body meets is not the others'
                    answers.append(error)
                    continue
                answers.append(_verdict(submission) if order.dry_run else None)
                if not order.dry_run:
                    wanted[index] = _new_job(order, submission)
        outcomes = self._store(list(wanted.values()))
        self._wake([outcome for outcome in outcomes if isinstance(outcome, _Stored)])
        for index, outcome in zip(wanted, outcomes, strict=True):
            answers[index] = Taken(outcome.body, outcome.job_id) if isinstance(outcome, _Stored) else outcome
        return [answer for answer in answers if answer is not None]

    def _store(self, wanted: Sequence[jobs.NewJob]) -> list[_Stored | Exception]:
        """Commit these together; where that cannot be, each for itself, so that none fails for another's."""
        if not wanted:
            return []
        try:
            return self._database.retry(lambda session: _stored(session, wanted))
        except StoreUnavailable as error:
            return [error] * len(wanted)
        except Exception as error:  # noqa: BLE001  # of one alone it is told to its client, as a defect
            if len(wanted) == 1:
                return [error]
            _log.warning("submitted_one_by_one", jobs=len(wanted), error=repr(error))
        return [outcome for one in wanted for outcome in self._store([one])]

    def _wake(self, committed: Sequence[_Stored]) -> None:
        for _ in committed:
            reach("submit.after_commit")
        created = [stored.job_id for stored in committed if stored.created]
        if created:
            wake_worker(self._settings, *created)
        for _ in committed:
            reach("submit.after_enqueue")


def _stored(session: Session, wanted: Sequence[jobs.NewJob]) -> list[_Stored | Exception]:
    outcomes = jobs.submit_all(session, wanted)
    earlier = [one.job for one in outcomes if isinstance(one, jobs.Submitted) and one.beginning is None]
    views = {view.id: view for view in job_views(session, earlier)}
    answers: list[_Stored | Exception] = []
    for outcome in outcomes:
        if not isinstance(outcome, jobs.Submitted):
            answers.append(outcome)
            continue
        job, beginning = outcome.job, outcome.beginning
        if beginning is not None:
            view = job_document(job, beginning.transitions, beginning.stats)
        elif job.id in views:
            view = views[job.id]
        else:
            answers.append(absent(job.id))
            continue
        answers.append(_Stored(job.id, json_bytes(view), outcome.created))
        reach("submit.before_commit")
    return answers


def _new_job(order: Order, submission: Submission) -> jobs.NewJob:
    return jobs.NewJob(
        tenant=order.tenant,
        spec=submission.spec,
        idempotency_key=order.idempotency_key,
        body_hash=order.body.digest,
        earlier_body_hash=order.body.earlier_digest,
        warnings=submission.warnings,
        actor=order.actor,
    )


def _verdict(submission: Submission) -> Taken:
    answer = DryRun(
        valid=True,
        warnings=list(submission.warnings),
        resolved=submission.spec.model_dump(mode="json"),
        capable_workers=submission.capable_workers,
    )
    return Taken(json_bytes(answer), None)
