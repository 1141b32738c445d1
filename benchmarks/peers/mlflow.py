"""MLflow's tracking server on loopback, as its documentation starts it, and the calls that log and read.

Its own interpreter runs the server; requests go over HTTP in one write each, on one connection that stays
open, so that what is measured is the server.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTS_WITHIN_SECONDS = 120.0


class Mlflow:
    """A client of one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One call; the answer's JSON."""
        content = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, body=content, headers={"content-type": "application/json"})
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {data[:300]!r}")
        return json.loads(data)

    def new_run(self) -> str:
        """The id of a run in the default experiment."""
        now = int(time.time() * 1000)
        run = self.call(
            "POST", "/api/2.0/mlflow/runs/create", {"experiment_id": "0", "start_time": now, "tags": []}
        )
        return str(run["run"]["info"]["run_id"])

    def log_batch(self, run: str, metrics: Sequence[tuple[str, float, int]]) -> None:
        """Metrics as (key, value, step), at most 1 000."""
        now = int(time.time() * 1000)
        entries = [
            {"key": key, "value": value, "timestamp": now, "step": step} for key, value, step in metrics
        ]
        self.call("POST", "/api/2.0/mlflow/runs/log-batch", {"run_id": run, "metrics": entries})

    def history(self, run: str, key: str) -> list[Any]:
        """Every value of one metric, in a page of the largest size."""
        path = f"/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key={key}&max_results=25000"
        return list(self.call("GET", path)["metrics"])

    def sampled(self, run: str, key: str, points: int) -> list[Any]:
        """What its plots read: at most `points` values of one metric."""
        path = (
            "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
            f"?run_ids={run}&metric_key={key}&max_results={points}"
        )
        return list(self.call("GET", path)["metrics"])


@contextmanager
def server(python: Path, *, workers: int = 4) -> Iterator[Mlflow]:
    """A server over a new SQLite file; ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        arguments = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
        arguments += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db"]
        arguments += ["--default-artifact-root", f"{directory}/artifacts"]
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(python), "-m", "mlflow", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
                start_new_session=True,
            )
        try:
            yield _when_ready(process, port, log)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _when_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> Mlflow:
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client = Mlflow(port)
            client.call("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0")
        except (OSError, http.client.HTTPException):
            time.sleep(0.25)
        else:
            return client
    raise RuntimeError(f"MLflow's server did not start: {log.read_text(errors='replace')[-2000:]}")
