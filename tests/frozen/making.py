"""Makes the frozen installation: what version 0.1 leaves on a disk, with a job in every state.

Run it by the Python of an installed 0.1 (commit e6f2b56), with a Redis that nobody else uses:

    cd CHECKOUT_OF_0.1 && .venv/bin/python …/tests/frozen/making.py …/tests/frozen/data redis://127.0.0.1:6379/9

It writes `installation.tar.xz`: the SQLite file, the checkpoints, and `index.json`, which names what is in
them. Jobs that trained did so in a real worker; the one named `under_way` lost its worker to SIGKILL, and
`run_through` is the same job undisturbed. The other states are brought about by the store's own functions.
Afterwards record the answers anew (`recording.py`): ids and times are other ones.
"""

import functools
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

VERSION, COMMIT = "0.1", "e6f2b56"
FAR_AWAY = 4_102_444_800.0
"""The year 2100: a worker that was seen then, or a lease that ends then, is alive in every test."""

SECRETS = {
    "acme": "tk_frozen_acme_00000000000000000000000000000000",
    "acme_reader": "tk_frozen_acme_reader_0000000000000000000000000",
    "beta": "tk_frozen_beta_00000000000000000000000000000000",
    "expired": "tk_frozen_expired_000000000000000000000000000000",
    "revoked": "tk_frozen_revoked_000000000000000000000000000000",
}
PORTABLE = {
    # The same sums in the same order on every x86-64: else each library takes the widest vectors there are.
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "HALFSTEP_WORKER_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
NAN_STEP, INF_STEP = 5, 9
TRAINED: dict[str, Any] = {
    "model": {"name": "mlp", "params": {"hidden": [16], "dropout": 0.1, "norm": "batch"}},
    "dataset": {
        "name": "synthetic",
        "params": {"samples": 640, "held_out_samples": 64, "features": 8, "non_finite_steps": [7, 15]},
    },
    "optimizer": {"name": "adamw", "params": {"lr": 0.01}},
    "scheduler": {"name": "cosine", "params": {"total": 3000}, "interval": "step"},
    "precision": {"mode": "gradient_scaling", "precision_level": "fp32", "scale_window": 50},
}


def old(name: str) -> Any:
    """A module of 0.1, whose import names are no longer this repository's."""
    return importlib.import_module(name)


class _Making:
    def __init__(self, folder: Path, broker_url: str) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HALFSTEP_")},
            **PORTABLE,
            "HALFSTEP_DATA_DIR": str(folder),
            "HALFSTEP_BROKER_URL": broker_url,
            "HALFSTEP_WORKER_DEVICE": "cpu",
            "HALFSTEP_WORKER_NAME": "host-1",
            "HALFSTEP_LEASE_SECONDS": "3",
            "HALFSTEP_HEARTBEAT_SECONDS": "0.5",
        }
        self.file = folder / "halfstep.db"
        url = f"sqlite:///{self.file}"
        old("service.store.schema").migrate(url)
        self.database = old("service.store.database").Database(url)
        self.jobs, self.metrics = old("service.store.jobs"), old("service.store.metrics")
        self.states = old("service.contract.states").JobState
        self.capability = capability()
        self.index: dict[str, str] = {}
        self.worker: subprocess.Popen[bytes] | None = None

    def write(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with self.database.begin() as session:
            return function(session, *arguments, **named)

    def submit(self, name: str, *, tenant: str = "acme", key: str | None = None, **spec: Any) -> str:
        document = {"name": name, **TRAINED, **spec}
        validated = old("service.contract.spec").JobSpec.model_validate(document)
        more = (
            {}
            if key is None
            else {"idempotency_key": key, "body_hash": hashlib.sha256(key.encode()).hexdigest()}
        )
        job, _ = self.write(self.jobs.submit, tenant=tenant, spec=validated, **more)
        self.index[name] = job.id
        return str(job.id)

    def start_worker(self) -> None:
        log = (self.folder.parent / "worker.log").open("ab")
        self.worker = subprocess.Popen(  # its own group: the job's process goes with it
            [sys.executable, "-m", "worker.app"], env=self.environment, start_new_session=True, stderr=log
        )

    def kill_worker(self) -> None:
        if self.worker is not None:
            os.killpg(self.worker.pid, signal.SIGKILL)
            self.worker.wait()
            self.worker = None

    def state(self, job_id: str) -> tuple[str, int]:
        with self.database.read() as session:
            stats = self.metrics.summarise(session, job_id)
        return str(stats.state), int(stats.current_step)

    def wait(self, job_id: str, what: Callable[[str, int], bool]) -> None:
        deadline = time.monotonic() + 180
        while not what(*self.state(job_id)):
            if time.monotonic() > deadline:
                with self.database.read() as session:
                    job = self.jobs.get(session, job_id, tenant=None)
                raise SystemExit(f"{job.name} is {job.state} after three minutes: {job.status_reason}")
            time.sleep(0.02)

    # Jobs of a real worker.

    def train(self) -> None:
        long = {"max_steps": 3000, "checkpoint_every_steps": 400, "evaluate_every_steps": 500, "seed": 3}
        short = {"max_steps": 60, "checkpoint_every_steps": 20, "evaluate_every_steps": 30, "seed": 5}
        succeeded = self.submit(
            "succeeded", training=short, tags={"team": "vision", "note": "größer: ½"}, key="key-succeeded"
        )
        hopeless = json.loads(json.dumps(TRAINED["dataset"]))
        hopeless["params"] |= {"non_finite_steps": list(range(1, 21)), "non_finite_value": "inf"}
        bad = {"dataset": hopeless, "training": {"max_steps": 60, "seed": 1}, "tags": {"team": "vision"}}
        rolled_back = self.submit("rolled_back", **bad)
        failed = self.submit("failed", **bad, precision=TRAINED["precision"] | {"nan_handling": False})
        through = self.submit("run_through", training=long, priority=-1)
        self.start_worker()
        for job_id, end in (
            (succeeded, "succeeded"),
            (rolled_back, "succeeded"),
            (failed, "failed"),
            (through, "succeeded"),
        ):
            self.wait(job_id, functools.partial(_is, end))
        paused = self.submit("paused", training=long)
        self.wait(paused, lambda state, step: state == "running" and step > 0)
        self.write(self.jobs.request_pause, paused, tenant="acme")
        self.wait(paused, lambda state, _: state == "paused")
        cancelled = self.submit("cancelled", training=long, tags={"team": "speech"})
        self.wait(cancelled, lambda state, step: state == "running" and step > 0)
        self.write(self.jobs.request_cancel, cancelled, tenant="acme")
        self.wait(cancelled, lambda state, _: state == "cancelled")
        under_way = self.submit("under_way", training=long, priority=900, tags={"team": "vision"})
        self.wait(under_way, lambda state, step: state == "running" and step > 1200)
        self.kill_worker()

    # Jobs whose state the store is told.

    def begin(self, job_id: str) -> int:
        job = self.write(
            self.jobs.claim, worker_id="worker-1", capability=self.capability, lease_seconds=60.0, hint=job_id
        )
        if job is None or job.id != job_id:
            raise SystemExit(f"claimed {job} instead of {job_id}")
        return int(job.fence)

    def run(self, name: str, **more: Any) -> tuple[str, int]:
        job_id = self.submit(name, priority=1000, **more)
        fence = self.begin(job_id)
        self.write(self.jobs.mark_running, job_id, fence)
        self.write(self.metrics.opened, job_id, fence, total_steps=20_000)
        return job_id, fence

    def steps(self, job_id: str, fence: int, first: int, last: int) -> None:
        self.write(self.metrics.append, job_id, fence, list(rows(first, last)), live(first, last))

    def craft(self) -> None:
        self.fleet()
        states = self.states
        job_id, fence = self.run("first_chunks")
        self.steps(job_id, fence, 1, 600)
        self.as_first_version(job_id)
        self.write(self.jobs.finish, job_id, fence, states.SUCCEEDED, None)

        job_id, fence = self.run("both_chunks", tags={"team": "speech", "run": "long"})
        self.steps(job_id, fence, 1, 700)
        self.as_first_version(job_id)
        for first in range(701, 9001, 83):
            self.steps(job_id, fence, first, min(first + 82, 9000))
        self.tell(job_id)
        self.write(self.jobs.finish, job_id, fence, states.SUCCEEDED, None)

        job_id, fence = self.run("running")
        self.steps(job_id, fence, 1, INF_STEP + 1)
        self.tell(job_id)
        job_id, fence = self.run("pausing")
        self.steps(job_id, fence, 1, NAN_STEP)
        self.write(self.jobs.request_pause, job_id, tenant="acme")
        job_id, fence = self.run("cancelling")
        self.write(self.jobs.request_cancel, job_id, tenant="acme")
        self.begin(self.submit("starting", priority=1000))

        job_id, fence = self.run("lost", max_attempts=1)
        self.steps(job_id, fence, 1, 40)
        left = {"exit": "signal 9", "last_words": "Killed\nüber \u2028 \ufffd"}
        self.write(self.jobs.release, job_id, fence, charge_attempt=True, why="its process died", left=left)

        _, checkpoint = self.newest_checkpoint(self.index["succeeded"])
        child, _ = self.write(
            old("service.store.retries").retry,
            self.index["succeeded"],
            tenant="acme",
            new_id=self.jobs.new_job_id(),
            from_checkpoint=checkpoint,
        )
        self.index["retry"] = child.id
        job_id, fence = self.run("gone")
        self.steps(job_id, fence, 1, 1200)
        self.write(self.jobs.finish, job_id, fence, states.SUCCEEDED, None)
        self.write(self.jobs.delete, job_id, tenant="acme")

        job_id, fence = self.run("beta_succeeded", tenant="beta", tags={"team": "vision"})
        self.steps(job_id, fence, 1, 3)
        self.write(self.jobs.finish, job_id, fence, states.SUCCEEDED, None)
        self.submit("beta_queued", tenant="beta")

        job_id, fence = self.run("given_back", resources={"device": "cpu"})
        self.write(self.jobs.release, job_id, fence, charge_attempt=True, why="the worker was lost")
        self.submit("queued", key="key-queued", priority=7, tags={"team": "vision", "kind": "a:b"})
        self.submit("queued_gpu", resources={"device": "cuda", "min_memory_bytes": 2**34})
        job_id = self.submit("paused_while_queued")
        self.write(self.jobs.request_pause, job_id, tenant="acme")
        job_id = self.submit("cancelled_while_queued")
        self.write(self.jobs.request_cancel, job_id, tenant="acme")

    def fleet(self) -> None:
        workers, keys = old("service.store.workers"), old("service.store.keys")
        fields = list(old("service.contract.speed").DtypeSpeed.model_fields)
        speed = {"float32": dict.fromkeys(fields, 1.5), "bfloat16": dict.fromkeys(fields, 0.75)}
        for number, more in ((1, {"speed": speed}), (2, {})):
            self.write(
                workers.register,
                worker_id=f"worker-{number}",
                name=f"host-{number}",
                pid=number,
                capability=self.capability,
                versions={"python": "3.11.2", "torch": "2.13.0", "halfstep": "0.1.0"},
                slots=2,
                **more,
            )
        self.write(workers.beat, "worker-1", busy=2, draining=False)
        self.write(workers.beat, "worker-2", busy=1, draining=True)
        for name, tenant, scopes, expires in (
            ("acme", "acme", ("read", "submit"), None),
            ("acme_reader", "acme", ("read",), None),
            ("beta", "beta", ("admin",), None),
            ("expired", "acme", ("read",), 1.0),
            ("revoked", "acme", ("admin",), None),
        ):
            secret = SECRETS[name]
            key = self.write(
                keys.import_secret, secret, tenant=tenant, name=name, scopes=scopes, expires_at=expires
            )
            if name == "revoked":
                self.write(keys.revoke, key.id)

    def tell(self, job_id: str) -> None:
        """One event of each type that no state brings about."""
        append, evaluation = old("service.store.events").append, old("service.contract.metrics").Evaluation
        for kind, level in (
            ("precision", "info"),
            ("overflow", "warning"),
            ("nan", "error"),
            ("alert", "warning"),
            ("worker", "debug"),
            ("warning", "warning"),
        ):
            data = {
                "step": 3,
                "value": math.inf if kind == "overflow" else math.nan,
                "layers": ["fc1", "ünï"],
            }
            self.write(append, job_id, type=kind, level=level, message=f"{kind}: of step 3", data=data)
        with self.database.read() as session:
            fence = self.jobs.get(session, job_id, tenant=None).fence
        found = evaluation(
            step=3, split="held_out", loss=math.nan, metrics={"accuracy": 0.1 + 0.2}, seconds=0.125
        )
        self.write(self.metrics.evaluated, job_id, fence, found)

    def newest_checkpoint(self, job_id: str) -> tuple[Any, int]:
        with self.database.read() as session:
            newest = self.jobs.checkpoints(session, job_id)[0]
        return newest, int(newest.step)

    def as_first_version(self, job_id: str) -> None:
        """Put the record as the first version of chunks had it: 256 steps each, uncompressed, no roll-ups."""
        totals_of = old("service.store.totals")
        with self.database.read() as session:
            columns = self.metrics.read(session, job_id, limit=10_000, fields=None).columns
        count, totals = len(columns["step"]), totals_of.Totals()
        stored = []
        for begin in range(0, count, 256):
            part = {name: values[begin : begin + 256] for name, values in columns.items()}
            totals = totals.after(part)
            steps = part["step"]
            stored.append((job_id, steps[0], steps[-1], totals.pack(), _first_version(part)))
        connection = sqlite3.connect(self.file)
        with connection:
            connection.execute("DELETE FROM metric_chunks WHERE job_id = ?", (job_id,))
            connection.executemany("INSERT INTO metric_chunks VALUES (?, ?, ?, ?, ?)", stored)
        connection.close()

    def finish(self) -> None:
        """Let the crafted workers and leases last, the killed worker be long gone, the file be whole."""
        self.database.dispose()
        connection = sqlite3.connect(self.file)
        with connection:
            connection.execute("UPDATE workers SET last_seen = last_seen - 3600")
            connection.execute("UPDATE workers SET last_seen = ? WHERE id LIKE 'worker-%'", (FAR_AWAY,))
            connection.execute("UPDATE jobs SET lease_until = ? WHERE worker_id = 'worker-1'", (FAR_AWAY,))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()


def _is(wanted: str, state: str, _step: int) -> bool:
    return state == wanted


def capability() -> Any:
    """What a worker that was never there can do."""
    return old("service.store.workers").Capability(
        "cpu", bf16=True, fp16=False, memory_bytes=2**33, device_name="a processor", device_count=1
    )


def live(first: int, last: int) -> Any:
    """What a worker tells beside the steps first..last."""
    return old("service.contract.metrics").LiveStats(
        current_scale=2048.0,
        memory_peak_bytes=3 * 10**9,
        steps_per_second=12.5,
        samples_per_second=400.0,
        step_time_ms_p50=1.25,
        step_time_ms_p95=2.5,
        step_time_ms_max=math.inf if first == 1 else 9.75,
        host_syncs_per_step=0.0,
        overflow_budget_exceeded=last > 100,
        last_overflow={"step": NAN_STEP, "layer": "fc1", "kind": "nan"} if first == 1 else None,
    )


def rows(first: int, last: int) -> Iterable[Any]:
    """Steps with what a record may hold: NaN, infinities, flags, a precision that changes, large integers."""
    step_metrics = old("service.contract.metrics").StepMetrics
    for step in range(first, last + 1):
        chance = random.Random(step)  # the same record whenever it is made
        bad = step in {NAN_STEP, INF_STEP} or step % 701 == 0
        yield step_metrics(
            step=step,
            epoch=1 + (step - 1) // 2500,
            loss=math.nan if step == NAN_STEP else math.inf if step == INF_STEP else 2.0 / step + 0.1,
            scale=float(2 ** (16 - step // 1000)),
            overflow=bad and step != NAN_STEP,
            nan=step == NAN_STEP,
            underflow=step % 997 == 0,
            skipped=bad,
            has_inf=bad and step != NAN_STEP,
            has_nan=step == NAN_STEP,
            underflow_estimate=0.0 if step % 3 else 1e-9,
            grad_norm=-math.inf if step == INF_STEP else float(chance.randrange(64)) / 7.0,
            learning_rate=1e-3 * 0.5 ** (step // 3000),
            memory_usage=0.25,
            memory_allocated_bytes=2**40 + chance.randrange(4),
            memory_reserved_bytes=2**41,
            step_time_ms=1.5 + chance.randrange(4) / 8,
            compute_dtype=("float32", "float16", "bfloat16")[step // 4000],
        )


def _first_version(columns: dict[str, Sequence[Any]]) -> bytes:
    """The payload of a chunk as the first version wrote it.

    Little-endian: version (1 byte), rows (uint32), then of each column but `step`: form (1 byte), base
    (int64), length (uint32), data. Nothing is compressed, and a value's bytes stand together.
    """
    contract = old("service.contract.metrics")
    head = struct.Struct("<cqI")
    parts = [struct.pack("<BI", 1, len(columns["step"]))]
    for name in contract.METRIC_COLUMNS[1:]:
        values = list(columns[name])
        if name == "compute_dtype":
            values = [contract.COMPUTE_DTYPES.index(value) for value in values]
        if any(isinstance(value, float) for value in values):
            doubles = array("d", values)
            exact = doubles.tobytes()
            narrow = array("f", values)
            if exact == exact[:8] * len(values):
                form, data = b"k", exact[:8]
            elif array("d", narrow).tobytes() == exact:
                form, data = b"f", narrow.tobytes()
            else:
                form, data = b"d", exact
            parts += [head.pack(form, 0, len(data)), data]
            continue
        base, top = min(values), max(values)
        if base == top:
            parts.append(head.pack(b"k", base, 0))
            continue
        code = next(
            code
            for most, code in ((2**8, "B"), (2**16, "H"), (2**32, "I"), (2**64, "Q"))
            if top - base < most
        )
        data = array(code, [value - base for value in values]).tobytes()
        parts += [head.pack(code.encode(), base, len(data)), data]
    return b"".join(parts)


def main(target: Path, broker_url: str) -> None:
    """Make the installation and write the archive."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        making = _Making(folder, broker_url)
        try:
            making.train()
        finally:
            making.kill_worker()
        making.craft()
        making.finish()
        for path in list(folder.iterdir()):
            if path.name not in {"halfstep.db", "jobs"}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # What only the reference needed of the disk: its weights are known by their hash.
        shutil.rmtree(folder / "jobs" / making.index["run_through"])
        index = {
            "version": VERSION,
            "commit": COMMIT,
            "made_at": time.time(),
            "jobs": making.index,
            "keys": SECRETS,
        }
        (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        with tarfile.open(target / "installation.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted(folder.rglob("*")):
                archive.add(path, path.relative_to(folder).as_posix(), recursive=False, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
