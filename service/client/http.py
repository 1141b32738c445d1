"""HTTP to a running service: one method a call, problem documents turned into exceptions.

Knows the paths and field names of the HTTP contract; prints nothing.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote, urlsplit
from uuid import UUID

import httpx

from halfstep.service.contract.answers import SeriesList, SeriesPage
from halfstep.service.errors import FieldProblem, HalfstepError
from halfstep.service.network import is_loopback

PREFIX_SEARCH = 1000  # jobs looked through, newest first, for an id's prefix
CONNECT_SECONDS = 5.0
WAIT_SECONDS = 10.0


class ServerUnreachable(HalfstepError):
    """No answer from the service."""

    code = "server_unreachable"


class ServerRefused(HalfstepError):
    """The service answered with a problem document.

    Attributes:
        status: HTTP status.
        title: The problem's title.
        problems: Wrong places in the body, as JSON pointers.
    """

    code = "server_refused"

    def __init__(self, status: int, title: str, detail: str, problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(detail or title)
        self.status = status
        self.title = title
        self.problems = problems


class NoSuchJob(HalfstepError):
    """No job has an id that starts so, or several have."""

    code = "no_such_job"


@dataclass(frozen=True, slots=True)
class Polled:
    """One answer of a conditional request; `body` is None when nothing has changed."""

    body: dict[str, Any] | None
    etag: str | None


def default_url() -> str:
    """HALFSTEP_URL, or this machine at HALFSTEP_PORT."""
    return os.environ.get("HALFSTEP_URL") or f"http://127.0.0.1:{os.environ.get('HALFSTEP_PORT') or 8000}"


class Api:
    """A client of one service. Use it as a context manager."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self.url = (url or default_url()).rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            message = (
                f"{self.url!r} is not an address of a service; use http://HOST:PORT (--url or HALFSTEP_URL)"
            )
            raise ServerUnreachable(message)
        key = key or os.environ.get("HALFSTEP_API_KEY")
        if key and not key.isascii():
            raise ServerUnreachable(
                "the API key has characters that no key has; check --key or HALFSTEP_API_KEY"
            )
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(15.0, connect=CONNECT_SECONDS, read=15.0 + WAIT_SECONDS),
            trust_env=not is_loopback(parts.hostname),  # a proxy cannot reach this machine's own loopback
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> dict[str, Any]:
        """POST /jobs; the Job."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        return self._json("POST", "/jobs", body=spec, headers=headers)

    def dry_run(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """POST /jobs?dry_run=true; `{valid, warnings, resolved, capable_workers}`."""
        return self._json("POST", "/jobs", body=spec, params={"dry_run": "true"})

    def list_jobs(
        self,
        *,
        states: list[str] | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """GET /jobs; `{items, next_cursor}`, newest first."""
        params: list[tuple[str, str]] = [("limit", str(limit))]
        params += [("state", state) for state in states or ()]
        params += [("tag", tag) for tag in tags or ()]
        if name:
            params.append(("name", name))
        if cursor:
            params.append(("cursor", cursor))
        return self._json("GET", "/jobs", params=params)

    def job(self, job_id: str) -> dict[str, Any]:
        """GET /jobs/{id}."""
        return self._json("GET", f"/jobs/{quote(job_id, safe='')}")

    def stats(self, job_id: str) -> dict[str, Any]:
        """GET /jobs/{id}/stats."""
        return self._json("GET", f"/jobs/{quote(job_id, safe='')}/stats")

    def poll_stats(self, job_id: str, etag: str | None) -> Polled:
        """GET /jobs/{id}/stats, answered when it differs from `etag` or after ten seconds."""
        headers = {"if-none-match": etag} if etag else {}
        params = {"wait_seconds": f"{WAIT_SECONDS:g}"} if etag else {}
        answer = self._call("GET", f"/jobs/{quote(job_id, safe='')}/stats", params=params, headers=headers)
        if answer.status_code == httpx.codes.NOT_MODIFIED:
            return Polled(None, etag)
        return Polled(_object(answer), answer.headers.get("etag"))

    def events(
        self, after: str | None, *, types: Sequence[str] = (), limit: int = 100, wait: bool = False
    ) -> dict[str, Any]:
        """GET /events; `{items, next_after}`. With `wait` answered when there is one or after ten seconds."""
        params: list[tuple[str, str]] = [("limit", str(limit)), *(("type", each) for each in types)]
        if after is not None:
            params.append(("after", after))
        if wait:
            params.append(("wait_seconds", f"{WAIT_SECONDS:g}"))
        return self._json("GET", "/events", params=params)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """POST /jobs/{id}/cancel; the Job."""
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/cancel")

    def pause(self, job_id: str) -> dict[str, Any]:
        """POST /jobs/{id}/pause; the Job."""
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/pause")

    def resume(self, job_id: str) -> dict[str, Any]:
        """POST /jobs/{id}/resume; the Job."""
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/resume")

    def retry(
        self, job_id: str, *, from_checkpoint: int | None = None, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """POST /jobs/{id}/retry; the new Job."""
        body = {} if from_checkpoint is None else {"from_checkpoint": from_checkpoint}
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/retry", body=body, headers=headers)

    def checkpoints(self, job_id: str) -> dict[str, Any]:
        """GET /jobs/{id}/checkpoints; `{items}`, newest first."""
        return self._json("GET", f"/jobs/{quote(job_id, safe='')}/checkpoints")

    @contextmanager
    def model(
        self, job_id: str, step: int, sha256: str, *, start: int
    ) -> Iterator[tuple[int, int, Iterator[bytes]]]:
        """GET /jobs/{id}/checkpoints/{step}/model from byte `start` on, if its sha256 is still this one.

        Gives where the answer really begins, the size of the whole, and the bytes.
        """
        headers = {"range": f"bytes={start}-", "if-range": f'"{sha256}"'} if start else {}
        try:
            with self._http.stream("GET", _model(job_id, step), headers=headers) as answer:
                if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    yield start, start, iter(())  # it had arrived to the last byte
                    return
                if answer.is_error:
                    answer.read()
                    raise _refusal(answer)
                begin = start if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
                yield begin, begin + int(answer.headers.get("content-length", 0)), answer.iter_bytes()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def list_series(self, job_id: str) -> SeriesList:
        """GET /jobs/{id}/series: the names of a job's series."""
        return SeriesList.of(self._json("GET", f"/jobs/{quote(job_id, safe='')}/series"))

    def series(self, job_id: str, name: str) -> Iterator[SeriesPage]:
        """GET /jobs/{id}/series/{name}: all points of a series, a page at a time."""
        path, begin = f"/jobs/{quote(job_id, safe='')}/series/{quote(name)}", 0
        while True:
            page = SeriesPage.of(self._json("GET", path, params={"from_step": begin, "limit": 10_000}))
            yield page
            if page.next_from_step is None:
                return
            begin = page.next_from_step

    def resolve(self, prefix: str) -> str:
        """The one job id that starts with `prefix`.

        Raises:
            NoSuchJob: None or several of the newest thousand jobs match.
        """
        try:
            return str(UUID(prefix))
        except ValueError:
            pass
        wanted = prefix.strip().lower()
        if not wanted or not set(wanted) <= set("0123456789abcdef-"):
            raise NoSuchJob(f"{prefix!r} is not a job id or the beginning of one; `halfstep jobs` lists them")
        found: list[str] = []
        cursor, seen = None, 0
        while seen < PREFIX_SEARCH:
            page = self.list_jobs(limit=100, cursor=cursor)
            found += [str(job["id"]) for job in page["items"] if str(job["id"]).startswith(wanted)]
            seen += len(page["items"])
            cursor = page.get("next_cursor")
            if not cursor:
                break
        if len(found) == 1:
            return found[0]
        if found:
            raise NoSuchJob(
                f"{len(found)} jobs have ids that start with {wanted!r}; give more characters of it"
            )
        raise NoSuchJob(
            f"no job of the newest {seen} has an id that starts with {wanted!r}; older ones need the whole id"
        )

    def _json(
        self,
        method: str,
        path: str,
        *,
        params: Any = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return _object(self._call(method, path, params=params, headers=headers, body=body))

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Any = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        all_headers = {
            **(headers or {}),
            **({"content-type": "application/json"} if body is not None else {}),
        }
        try:
            answer = self._http.request(method, path, params=params, headers=all_headers, content=content)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise _refusal(answer)
        return answer

    def _unreachable(self, error: httpx.HTTPError) -> ServerUnreachable:
        reason = str(error) or type(error).__name__
        return ServerUnreachable(
            f"no answer from {self.url} ({reason}); is it running (`halfstep up`), is HALFSTEP_URL right?"
        )


def _model(job_id: str, step: int) -> str:
    return f"/jobs/{quote(job_id, safe='')}/checkpoints/{step}/model"


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError as error:
        raise ServerUnreachable(
            f"{answer.url} did not answer with JSON ({answer.status_code}); is HALFSTEP_URL right?"
        ) from error
    if not isinstance(body, dict):
        raise ServerUnreachable(f"{answer.url} answered with something that is not a Halfstep document")
    return body


def _refusal(answer: httpx.Response) -> ServerRefused:
    try:
        document = answer.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return ServerRefused(answer.status_code, answer.reason_phrase, answer.text[:500].strip())
    problems = tuple(
        FieldProblem(str(each.get("pointer", "")), str(each.get("detail", "")))
        for each in document.get("errors") or ()
        if isinstance(each, dict)
    )
    title = str(document.get("title") or answer.reason_phrase)
    return ServerRefused(answer.status_code, title, str(document.get("detail") or ""), problems)
