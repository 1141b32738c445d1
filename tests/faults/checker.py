"""What must hold after any run, whatever was done to it: pure functions over evidence, no process, no SQL.

Each function finds one kind of violation; `check` asks them all. `test_checker` shows each of them red.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from halfstep.service.contract.metrics import METRIC_COLUMNS
from halfstep.service.contract.states import LEASED, TERMINAL, TRANSITIONS, JobState

# What a step decides; the rest of a row are times and bytes of the process that took it.
EXACT = [name for name in METRIC_COLUMNS if not name.startswith("memory") and name != "step_time_ms"]
CANCEL_GRACE_SECONDS = 10.0 + 2.0 + 5.0  # to stop by itself, to be ended, and a slow machine's share


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a client and its answer; `status` None where none came."""

    at: float
    method: str
    path: str
    key: str | None = None
    status: int | None = None
    job_id: str | None = None
    variant: str | None = None
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One write as the database itself saw it.

    `kind` is "state" (of the job's row), "steps" or "checkpoint"; `writer` is the fence that the write names,
    `fence` the job's own at that moment.
    """

    at: float
    job_id: str
    kind: str
    old: Any
    new: Any
    old_fence: int
    fence: int
    writer: int | None = None
    lease_until: float | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that the record names, and whether it could be loaded."""

    step: int
    fence: int
    sha256: str
    loads: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """A job at the end of the run."""

    state: str
    fence: int
    attempt: int
    max_attempts: int
    code: str | None
    variant: str
    states: Sequence[tuple[str, float, str | None]]  # state, at, reason
    columns: Mapping[str, Sequence[Any]]
    checkpoints: Sequence[Saved]


@dataclass(frozen=True, slots=True)
class Reference:
    """The same job, undisturbed."""

    state: str
    code: str | None
    columns: Mapping[str, Sequence[Any]]
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a run left behind."""

    history: Sequence[Request] = ()
    jobs: Mapping[str, Seen] = field(default_factory=dict)
    keys: Sequence[tuple[str, str]] = ()  # idempotency key, job
    changes: Sequence[Change] = ()
    references: Mapping[str, Reference] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise."""

    invariant: str
    job_id: str | None
    what: str


Finding = tuple[str | None, str]


def acknowledged_jobs_end(evidence: Evidence) -> Iterable[Finding]:
    for request in evidence.history:
        if request.method == "POST" and request.path == "/jobs" and request.status == 202:
            job = evidence.jobs.get(request.job_id or "")
            if job is None:
                yield request.job_id, "was acknowledged and is gone"
            elif job.state not in TERMINAL:
                yield request.job_id, f"was acknowledged and is {job.state}"
    for job_id, job in evidence.jobs.items():
        ends = [state for state, _, _ in job.states if state in TERMINAL]
        if len(ends) > 1:
            yield job_id, f"ended {len(ends)} times: {ends}"


def outcomes_are_those_of_the_undisturbed_run(evidence: Evidence) -> Iterable[Finding]:
    asked = _cancelled(evidence)
    for job_id, job in evidence.jobs.items():
        wanted = evidence.references.get(job.variant)
        if wanted is None or (job.state == "cancelled" and job_id in asked) or job.state not in TERMINAL:
            continue
        if (job.state, job.code) != (wanted.state, wanted.code):
            yield job_id, f"is {job.state} ({job.code}) instead of {wanted.state} ({wanted.code})"


def one_job_per_key(evidence: Evidence) -> Iterable[Finding]:
    by_key: dict[str, set[str]] = defaultdict(set)
    for key, job_id in evidence.keys:
        by_key[key].add(job_id)
    for request in evidence.history:
        if request.key is not None and request.status == 202 and request.job_id is not None:
            by_key[request.key].add(request.job_id)
    for key, job_ids in by_key.items():
        if len(job_ids) > 1:
            yield None, f"key {key} made {len(job_ids)} jobs: {sorted(job_ids)}"
    if evidence.keys:
        for job_id in evidence.jobs.keys() - {job_id for _, job_id in evidence.keys}:
            yield job_id, "was made by no request of ours"


def steps_are_each_there_once(evidence: Evidence) -> Iterable[Finding]:
    for job_id, job in evidence.jobs.items():
        steps = list(job.columns.get("step", ()))
        if steps != list(range(1, len(steps) + 1)):
            twice = [step for step, count in Counter(steps).items() if count > 1]
            yield job_id, f"its {len(steps)} steps are not 1..N; twice: {twice[:5]}"


def steps_equal_the_undisturbed_run(evidence: Evidence) -> Iterable[Finding]:
    for job_id, job in evidence.jobs.items():
        wanted = evidence.references.get(job.variant)
        if wanted is None:
            continue
        if wanted.code == "non_finite_loss" and job.code != wanted.code:
            # Before it fails it goes back once by itself and leaves batches out: one that was cancelled
            # sooner has steps of its first pass.
            continue
        count = len(job.columns.get("step", ()))
        if job.state == "succeeded" and count != len(wanted.columns["step"]):
            yield job_id, f"has {count} steps instead of {len(wanted.columns['step'])}"
        for name in EXACT:
            differ = [
                step
                for step, (mine, theirs) in enumerate(
                    zip(job.columns.get(name, ()), wanted.columns[name], strict=False), start=1
                )
                if not _same(mine, theirs)
            ]
            if differ:
                yield job_id, f"{name} differs in {len(differ)} steps, first in step {differ[0]}"
                break


def weights_equal_the_undisturbed_run(evidence: Evidence) -> Iterable[Finding]:
    for job_id, job in evidence.jobs.items():
        wanted = evidence.references.get(job.variant)
        if wanted is None or job.state != "succeeded":
            continue
        last = max(job.checkpoints, key=lambda saved: saved.step, default=None)
        if last is None or last.step != len(wanted.columns["step"]):
            yield job_id, "has no checkpoint of its last step"
        elif last.sha256 != wanted.sha256:
            yield job_id, f"its weights are {last.sha256[:12]} instead of {str(wanted.sha256)[:12]}"


def fences_only_rise(evidence: Evidence) -> Iterable[Finding]:
    for change in evidence.changes:
        if change.kind != "state":
            continue
        claimed = change.new == JobState.STARTING and change.old == JobState.QUEUED
        if change.fence != change.old_fence + int(claimed):
            yield (
                change.job_id,
                f"its fence went from {change.old_fence} to {change.fence} as it became {change.new}",
            )
    for job_id, job in evidence.jobs.items():
        claims = sum(state == JobState.STARTING for state, _, _ in job.states)
        if job.fence != claims:
            yield job_id, f"was claimed {claims} times and has fence {job.fence}"


def nothing_is_written_under_an_old_fence(evidence: Evidence) -> Iterable[Finding]:
    for change in evidence.changes:
        if change.writer is not None and change.writer != change.fence:
            yield (
                change.job_id,
                f"{change.kind} {change.new} written under fence {change.writer} while {change.fence} held",
            )


def never_two_live_leases(evidence: Evidence) -> Iterable[Finding]:
    """A lease ends by its holder's word or by the clock, and a claim finds a job that nobody holds."""
    reasons: dict[str, list[str | None]] = {
        job_id: [reason for _, _, reason in job.states] for job_id, job in evidence.jobs.items()
    }
    taken: Counter[str] = Counter()
    for change in evidence.changes:
        if change.kind != "state" or change.old == change.new:
            continue
        taken[change.job_id] += 1
        if change.new == JobState.STARTING and change.old in LEASED:
            yield change.job_id, f"was claimed while it was {change.old}"
        told = reasons.get(change.job_id, [])
        why = told[taken[change.job_id]] if taken[change.job_id] < len(told) else None
        if (
            why
            and why.startswith("the lease of ")
            and change.lease_until is not None
            and change.lease_until > change.at
        ):
            yield (
                change.job_id,
                f"was taken back {change.lease_until - change.at:.2f} s before its lease ended",
            )


def what_is_cancelled_stays_so(evidence: Evidence) -> Iterable[Finding]:
    ended: dict[str, float] = {}
    for job_id, job in evidence.jobs.items():
        for state, at, _ in job.states:
            if state in TERMINAL:
                ended.setdefault(job_id, at)
        states = [state for state, _, _ in job.states]
        if states and any(state in TERMINAL for state in states[:-1]):
            yield job_id, f"went on after its end: {states}"
    accepted = _cancelled(evidence, answered=True)
    for change in evidence.changes:
        if change.job_id in ended and change.at > ended[change.job_id] + 0.001 and change.kind != "state":
            yield change.job_id, f"{change.kind} {change.new} written after its end"
        limit = accepted.get(change.job_id, math.inf) + CANCEL_GRACE_SECONDS
        if change.kind == "steps" and change.at > limit:
            yield change.job_id, f"steps to {change.new} written {change.at - limit:.1f} s after the grace"


def past_its_first_a_checkpoint_loads(evidence: Evidence) -> Iterable[Finding]:
    saved = {change.job_id for change in evidence.changes if change.kind == "checkpoint"}
    for job_id, job in evidence.jobs.items():
        if job_id in saved and not any(kept.loads for kept in job.checkpoints):
            yield job_id, f"none of its {len(job.checkpoints)} checkpoints can be loaded"
    steps: dict[str, set[int]] = defaultdict(set)
    for change in evidence.changes:
        if change.kind == "checkpoint":
            steps[change.job_id].add(change.new)
        # Only one of them is ever damaged here; a job that must fail goes back on purpose.
        elif change.kind == "cut" and change.new == 0 and len(steps[change.job_id]) > 1:
            cut = evidence.jobs.get(change.job_id)
            wanted = evidence.references.get(cut.variant) if cut is not None else None
            if wanted is not None and wanted.code is None:
                saved_at = sorted(steps[change.job_id])
                yield change.job_id, f"began anew although it had checkpoints of the steps {saved_at[-2:]}"


def the_api_refuses_only_as_documented(evidence: Evidence) -> Iterable[Finding]:
    for request in evidence.history:
        if request.status is not None and request.status >= 500:
            if request.status != 503:
                yield request.job_id, f"{request.method} {request.path} was answered {request.status}"
            elif request.retry_after is None:
                yield request.job_id, f"{request.method} {request.path}: 503 without Retry-After"


def states_move_along_edges(evidence: Evidence) -> Iterable[Finding]:
    for job_id, job in evidence.jobs.items():
        states = [JobState(state) for state, _, _ in job.states]
        if not states or states[0] is not JobState.QUEUED or states[-1] != job.state:
            yield job_id, f"its states {states} do not lead from queued to {job.state}"
        for before, after in pairwise(states):
            if after not in TRANSITIONS[before]:
                yield job_id, f"went from {before} to {after}"
    for change in evidence.changes:
        moved = change.kind == "state" and change.old != change.new
        if moved and JobState(change.new) not in TRANSITIONS[JobState(change.old)]:
            yield change.job_id, f"its row went from {change.old} to {change.new}"


def attempts_are_bounded(evidence: Evidence) -> Iterable[Finding]:
    for job_id, job in evidence.jobs.items():
        # One that lost its attempt and ended in the queue is in an attempt that nobody claimed.
        last = [state for state, _, _ in job.states[:-1]][-1:]
        unclaimed = int(last == ["queued"] and job.fence > 0)
        if not 1 <= job.attempt <= min(job.max_attempts, max(1, job.fence + unclaimed)):
            yield job_id, f"is in attempt {job.attempt} of {job.max_attempts} after {job.fence} claims"


INVARIANTS: dict[str, Callable[[Evidence], Iterable[Finding]]] = {
    function.__name__.replace("_", " "): function
    for function in (
        acknowledged_jobs_end,
        outcomes_are_those_of_the_undisturbed_run,
        one_job_per_key,
        steps_are_each_there_once,
        steps_equal_the_undisturbed_run,
        weights_equal_the_undisturbed_run,
        fences_only_rise,
        nothing_is_written_under_an_old_fence,
        never_two_live_leases,
        what_is_cancelled_stays_so,
        past_its_first_a_checkpoint_loads,
        the_api_refuses_only_as_documented,
        states_move_along_edges,
        attempts_are_bounded,
    )
}


def check(evidence: Evidence) -> list[Violation]:
    """Every violation there is."""
    return [
        Violation(name, job_id, what)
        for name, invariant in INVARIANTS.items()
        for job_id, what in invariant(evidence)
    ]


def _cancelled(evidence: Evidence, *, answered: bool = False) -> dict[str, float]:
    """When a cancel was first sent: one without an answer may or may not have arrived."""
    asked: dict[str, float] = {}
    for request in evidence.history:
        if request.path.endswith("/cancel") and request.job_id is not None:
            if answered and request.status != 200:
                continue
            asked.setdefault(request.job_id, request.at)
    return asked


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float) and isinstance(theirs, float) and math.isnan(mine):
        return math.isnan(theirs)
    return bool(mine == theirs)
