"""Warnings that a precision is slower than FP32: by what the workers measured, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from halfstep.service.store.fleet import components, workers
from halfstep.service.store.fleet.components import ComponentInfo
from halfstep.service.store.sql.database import Database

from .conftest import CPU, SPEC

CNN = ComponentInfo(
    "model",
    "cnn",
    "Two convolutions.",
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"convolutional": True},
)


def figures(matmul: float, convolution: float) -> dict[str, float]:
    return {
        "matmul": matmul,
        "convolution": convolution,
        "matmul_gflops": 100 * matmul,
        "convolution_gflops": 50 * convolution,
    }


SPEED = {"float32": figures(1, 1), "bfloat16": figures(0.52, 1.5), "float16": figures(0.021, 0.013)}


def publish(
    database: Database,
    speed: dict[str, dict[str, float]] | None,
    worker_id: str = "w1",
    capability: workers.Capability = CPU,
) -> None:
    with database.begin() as session:
        components.publish(session, [CNN])
        workers.register(
            session,
            worker_id=worker_id,
            name=worker_id,
            pid=7,
            capability=capability,
            versions={},
            slots=1,
            speed=speed,
        )


def slow(client: TestClient, **changes: Any) -> list[str]:
    verdict = client.post("/jobs?dry_run=true", json={**SPEC, **changes}).json()
    return [warning for warning in verdict["warnings"] if "times float32's speed" in warning]


def test_the_measured_figure_and_the_remedy_are_told(client: TestClient, database: Database) -> None:
    publish(database, SPEED)
    [warning] = slow(client)  # mixed, which is bfloat16 on a CPU
    assert warning.startswith("precision_level: on cpu matrix products in bfloat16 run at 0.52 times")
    assert "'fp32' trains faster there" in warning
    [warning] = slow(client, precision={"precision_level": "fp16"})
    assert "float16 run at 0.021 times" in warning
    assert slow(client, precision={"precision_level": "fp32"}) == []
    assert slow(client, precision={"enabled": False}) == []


def test_a_model_of_convolutions_goes_by_theirs(client: TestClient, database: Database) -> None:
    publish(database, SPEED)
    assert slow(client, model={"name": "cnn"}) == []
    [warning] = slow(client, model={"name": "cnn"}, precision={"precision_level": "fp16"})
    assert "convolutions in float16 run at 0.013 times" in warning
    assert "'bf16' trains faster there, at 1.5 times" in warning


@pytest.mark.parametrize("speed", [None, {**SPEED, "bfloat16": figures(2.1, 1.2)}])
def test_no_figure_or_a_faster_one_warns_of_nothing(
    client: TestClient, database: Database, speed: dict[str, dict[str, float]] | None
) -> None:
    publish(database, speed)
    assert slow(client) == []


def test_only_devices_that_the_job_may_run_on_count(client: TestClient, database: Database) -> None:
    gpu = workers.Capability(
        "cuda", bf16=False, fp16=True, memory_bytes=2**34, device_name="Tesla P40", device_count=1
    )
    publish(database, SPEED)
    publish(database, {"float32": figures(1, 1), "float16": figures(0.1, 0.2)}, "w2", gpu)
    on_both = slow(client)
    assert len(on_both) == 2
    assert any("on Tesla P40 matrix products in float16 run at 0.1 times" in warning for warning in on_both)
    assert slow(client, resources={"device": "cuda"}) == [on_both[1]]


def test_workers_with_one_kind_of_device_are_one_warning(client: TestClient, database: Database) -> None:
    publish(database, SPEED)
    publish(database, {**SPEED, "bfloat16": figures(0.5, 1.4)}, "w2")
    [warning] = slow(client)
    assert "0.5 times" in warning


def test_the_warning_is_an_event_of_the_job(
    client: TestClient, database: Database, submit: Callable[..., str]
) -> None:
    publish(database, SPEED)
    [warning] = slow(client)
    events = client.get(f"/jobs/{submit()}/events").json()["items"]
    assert warning in [event["message"] for event in events if event["type"] == "warning"]


def test_the_fleet_shows_what_was_measured(client: TestClient, database: Database) -> None:
    [unmeasured] = client.get("/workers").json()["items"]
    assert unmeasured["capability"]["speed"] is None
    publish(database, SPEED)
    [worker] = client.get("/workers").json()["items"]
    assert worker["capability"]["speed"] == SPEED
