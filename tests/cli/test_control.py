"""Steering a job from the command line, and fetching its weights over a connection that breaks."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, Serve
from tests.cli.stub import Answer, Asked

ID = "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50"
WEIGHTS = "0123456789" * 20
SHA256 = hashlib.sha256(WEIGHTS.encode()).hexdigest()
KEPT = [
    {
        "step": step,
        "bytes": 4096,
        "sha256": sha256,
        "created_at": "2026-01-02T03:04:05Z",
        "metrics": {"loss": 0.5},
    }
    for step, sha256 in ((20, SHA256), (10, "cd" * 32))
]


def service(model: Callable[[Asked], Answer] = lambda _: Answer(200, WEIGHTS)) -> Callable[[Asked], Answer]:
    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/checkpoints"):
            return Answer(200, {"items": KEPT})
        if asked.path.endswith("/model"):
            return model(asked)
        if asked.path.endswith("/retry"):
            return Answer(202, {"id": "child", "state": "queued"})
        if asked.path.endswith("/resume"):
            return Answer(409, {"title": "Conflict", "detail": "the job's pause is not over yet"})
        return Answer(200, {"id": ID, "state": "pausing"})

    return answer


def test_pause_prints_what_the_job_is_now(serve: Serve, halfstep: Run) -> None:
    stub = serve(service())
    assert halfstep("pause", ID).out == f"{ID} pausing\n"
    assert json.loads(halfstep("pause", ID, "--json").out)["state"] == "pausing"
    assert {(asked.method, asked.path) for asked in stub.asked} == {("POST", f"/jobs/{ID}/pause")}


def test_a_conflict_is_told_with_its_reason(serve: Serve, halfstep: Run) -> None:
    serve(service())
    ran = halfstep("resume", ID)
    assert ran.code == 1
    assert "not over yet" in ran.err


def test_retry_names_the_new_job(serve: Serve, halfstep: Run) -> None:
    stub = serve(service())
    assert halfstep("retry", ID).out == "child queued\n"
    halfstep("retry", ID, "--from-checkpoint", "20", "--idempotency-key", "k")
    assert [asked.body for asked in stub.asked] == [{}, {"from_checkpoint": 20}]
    assert [asked.headers.get("idempotency-key") for asked in stub.asked] == [None, "k"]
    assert halfstep("retry", ID, "--from-checkpoint", "0").code == 2


def test_checkpoints_are_a_table(serve: Serve, halfstep: Run) -> None:
    serve(service())
    lines = halfstep("checkpoints", ID).out.splitlines()
    assert lines[0].split() == ["step", "size", "loss", "created", "sha256"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [("20", SHA256), ("10", "cd" * 32)]
    assert json.loads(halfstep("checkpoints", ID, "--json").out) == {"items": KEPT}


def test_the_newest_weights_are_downloaded_and_named(
    serve: Serve, halfstep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = serve(service())
    monkeypatch.chdir(tmp_path)
    ran = halfstep("download", ID)
    assert (ran.code, ran.out) == (0, f"{ID}-step-20.safetensors\n")
    assert (tmp_path / f"{ID}-step-20.safetensors").read_text() == WEIGHTS
    assert [asked.path for asked in stub.asked][-1] == f"/jobs/{ID}/checkpoints/20/model"
    again = halfstep("download", ID)
    assert again.code == 1
    assert "--force" in again.err
    assert halfstep("download", ID, "--force").code == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_a_download_goes_on_where_it_was_cut(serve: Serve, halfstep: Run, tmp_path: Path) -> None:
    def model(asked: Asked) -> Answer:
        if "range" not in asked.headers:
            return Answer(200, WEIGHTS[:70], promised=len(WEIGHTS))
        assert asked.headers["range"] == "bytes=70-"
        assert asked.headers["if-range"] == f'"{SHA256}"'
        return Answer(206, WEIGHTS[70:])

    serve(service(model))
    target = tmp_path / "weights"
    cut = halfstep("download", ID, "-o", str(target))
    assert cut.code == 1
    assert "goes on where it stopped" in cut.err
    assert not target.exists()
    assert halfstep("download", ID, "-o", str(target)).code == 0
    assert target.read_text() == WEIGHTS
    assert list(tmp_path.iterdir()) == [target]


def test_weights_that_changed_meanwhile_are_taken_from_the_start(
    serve: Serve, halfstep: Run, tmp_path: Path
) -> None:
    serve(service(lambda _: Answer(200, WEIGHTS)))  # the whole, as after an If-Range that does not match
    (tmp_path / f"weights.{SHA256[:16]}.part").write_text("x" * 500)
    assert halfstep("download", ID, "-o", str(tmp_path / "weights")).code == 0
    assert (tmp_path / "weights").read_text() == WEIGHTS


def test_what_had_arrived_to_the_last_byte_is_only_verified(
    serve: Serve, halfstep: Run, tmp_path: Path
) -> None:
    serve(service(lambda _: Answer(416, {"title": "x"})))
    (tmp_path / f"weights.{SHA256[:16]}.part").write_text(WEIGHTS)
    assert halfstep("download", ID, "-o", str(tmp_path / "weights")).code == 0
    assert (tmp_path / "weights").read_text() == WEIGHTS


def test_wrong_bytes_become_no_file(serve: Serve, halfstep: Run, tmp_path: Path) -> None:
    serve(service(lambda _: Answer(200, "x" + WEIGHTS[1:])))
    ran = halfstep("download", ID, "-o", str(tmp_path / "weights"))
    assert ran.code == 1
    assert "not those that were saved" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_not_there_and_a_place_that_is_not_there(
    serve: Serve, halfstep: Run, tmp_path: Path
) -> None:
    serve(service())
    assert "no checkpoint of step 7" in halfstep("download", ID, "--step", "7").err
    ran = halfstep("download", ID, "-o", str(tmp_path / "no" / "weights"))
    assert ran.code == 1
    assert "cannot be written" in ran.err
