"""The suite's client: asks again until it is answered, and keeps every request and answer."""

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from tests.faults.checker import Request


class Client:
    """One client of the API. `history` only grows, in memory and in a file."""

    def __init__(self, url: str, file: Path) -> None:
        self._http = httpx.Client(base_url=url, timeout=15.0)
        self._lock = threading.Lock()
        self._file = file
        self.history: list[Request] = []

    def ask(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        body: dict[str, Any] | None = None,
        job_id: str | None = None,
        variant: str | None = None,
    ) -> tuple[int | None, dict[str, Any]]:
        """One request; the status is None where the connection broke."""
        at = time.time()
        answer: dict[str, Any] = {}
        status, retry_after = None, None
        try:
            response = self._http.request(
                method, path, json=body, headers={} if key is None else {"Idempotency-Key": key}
            )
            status, retry_after = response.status_code, response.headers.get("retry-after")
            answer = response.json() if response.content else {}
        except (httpx.TransportError, ValueError):
            pass
        entry = Request(
            at=at,
            method=method,
            path=path,
            key=key,
            status=status,
            job_id=job_id or (answer.get("id") if isinstance(answer, dict) else None),
            variant=variant,
            retry_after=retry_after,
        )
        with self._lock:
            self.history.append(entry)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        return status, answer

    def submit(self, spec: dict[str, Any], *, key: str, variant: str, seconds: float = 120.0) -> str:
        """Submit until it is acknowledged, always with the same key; returns the job's id."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status, answer = self.ask("POST", "/jobs", key=key, body=spec, variant=variant)
            if status == 202:
                job_id: str = answer["id"]
                return job_id
            if status is not None and status != 503:
                raise AssertionError(f"a submission was answered {status}: {answer}")
            time.sleep(0.1)
        raise AssertionError(f"no submission was acknowledged for {seconds:g} s")

    def close(self) -> None:
        self._http.close()
