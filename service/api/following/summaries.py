"""The summaries that clients poll for: read together, and written out as JSON once per change.

A poll costs one look at the version of its job; the summary is read and spelled out when that has moved.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from halfstep.service.api.answers.views import stats_view
from halfstep.service.api.answers.wire import json_bytes
from halfstep.service.api.shared_visits import SharedVisits
from halfstep.service.errors import NotFound
from halfstep.service.store import record
from halfstep.service.store.job_rows import absent, known_shape
from halfstep.service.store.sql.database import Database

MOST_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary as it was at one version of its job.

    Attributes:
        version: rises with every change of the job's state, steps or events.
        is_terminal: it will never change again.
        body: the answer's JSON.
    """

    version: int
    is_terminal: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class _Wanted:
    tenant: str
    job_id: str


class Summaries:
    """The summaries of the jobs in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # By tenant too: what one may see says nothing of another.
        self._kept: OrderedDict[_Wanted, Summary] = OrderedDict()
        self._reads: SharedVisits[_Wanted, Summary] = SharedVisits(self._read)

    async def of(self, job_id: str, *, tenant: str) -> Summary:
        """The summary as it is now.

        Raises:
            NotFound: there is no such job of this tenant's.
            StoreUnavailable: the database did not answer.
        """
        return await self._reads.ask(_Wanted(tenant, known_shape(job_id)))

    def _read(self, wanted: Sequence[_Wanted]) -> list[Summary | Exception]:
        with self._database.read() as session:
            versions = record.versions(session, list({one.job_id for one in wanted}))
            found = {one: self._one(session, one, versions.get(one.job_id)) for one in dict.fromkeys(wanted)}
        return [found[one] for one in wanted]

    def _one(self, session: Session, wanted: _Wanted, version: int | None) -> Summary | Exception:
        if version is None:
            self._kept.pop(wanted, None)
            return absent(wanted.job_id)
        kept = self._kept.get(wanted)
        if kept is not None and kept.version == version:
            self._kept.move_to_end(wanted)
            return kept
        try:
            stats = record.summarise(session, wanted.job_id, tenant=wanted.tenant)
        except NotFound as error:
            return error
        # Its own version, which may be later than the one just seen.
        summary = Summary(stats.version, stats.is_terminal, json_bytes(stats_view(stats)))
        self._kept[wanted] = summary
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return summary
