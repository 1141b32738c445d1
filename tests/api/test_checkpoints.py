"""Checkpoints over HTTP: the list, the weights, and ranges of them."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from halfstep.service.api.answers.byte_ranges import Unsatisfiable, requested
from halfstep.service.contract.states import JobState
from halfstep.service.files.storage import MODEL_FILE
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database
from tests.stores import Store, store_in

from .conftest import Trainer

Submit = Callable[..., str]
WEIGHTS = bytes(range(256)) * 5000  # more than one piece
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(params=["disk", "remote"])
def kept_in(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with store_in(tmp_path / "store") as made:
        yield made


@pytest.fixture
def settings(settings: Settings, kept_in: str, store: Store) -> Settings:
    return settings if kept_in == "disk" else settings.model_copy(update={"checkpoint_url": store.url})


@pytest.fixture
def root(settings: Settings, kept_in: str, store: Store) -> Path:
    """Below which the files are."""
    return settings.data_dir if kept_in == "disk" else store.directory


@pytest.fixture
def trainer(database: Database, root: Path) -> Trainer:
    return Trainer(database, root)


@pytest.fixture
def job_id(submit: Submit, trainer: Trainer) -> str:
    made = submit()
    fence = trainer.claim(made)
    trainer.steps(made, fence, 1, 9)
    trainer.checkpoint(made, fence, 6, b"other")
    trainer.checkpoint(made, fence, 9, WEIGHTS)
    trainer.end(made, fence, JobState.SUCCEEDED)
    return made


@pytest.fixture
def directory(job_id: str, root: Path) -> Path:
    return root / "jobs" / job_id / "checkpoints" / "fence-000001-step-0000000009"


def test_the_list_is_newest_first(client: TestClient, job_id: str) -> None:
    items = client.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    assert [item["step"] for item in items] == [9, 6]
    assert set(items[0]) == {"step", "bytes", "sha256", "created_at", "metrics"}
    assert (items[0]["bytes"], items[0]["sha256"], items[0]["metrics"]) == (
        len(WEIGHTS),
        SHA256,
        {"loss": 0.5},
    )
    assert re.fullmatch(r"\d{4}-.*Z", items[0]["created_at"])


def test_the_whole(client: TestClient, job_id: str) -> None:
    answer = client.get(f"/jobs/{job_id}/checkpoints/9/model")
    assert (answer.status_code, answer.content) == (200, WEIGHTS)
    expected = {
        "content-type": "application/octet-stream",
        "content-length": str(len(WEIGHTS)),
        "accept-ranges": "bytes",
        "etag": f'"{SHA256}"',
        "content-disposition": f'attachment; filename="{job_id}-step-9.safetensors"',
    }
    assert expected.items() <= dict(answer.headers).items()
    head = client.head(f"/jobs/{job_id}/checkpoints/9/model")
    assert (head.status_code, head.content) == (200, b"")
    assert expected.items() <= dict(head.headers).items()


@pytest.mark.parametrize(
    ("range_", "expected"),
    [
        ("bytes=0-9", (0, 10)),
        ("bytes=10-", (10, len(WEIGHTS))),
        ("bytes=-7", (len(WEIGHTS) - 7, len(WEIGHTS))),
        ("bytes=1048570-1048590", (1048570, 1048591)),
        ("BYTES= 5 - 5", (5, 6)),
        (f"bytes=0-{10**18}", (0, len(WEIGHTS))),
        ("bytes=-99999999", (0, len(WEIGHTS))),
    ],
)
def test_a_range(client: TestClient, job_id: str, range_: str, expected: tuple[int, int]) -> None:
    start, end = expected
    answer = client.get(f"/jobs/{job_id}/checkpoints/9/model", headers={"range": range_})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(WEIGHTS)}"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["etag"] == f'"{SHA256}"'


@pytest.mark.parametrize("range_", [f"bytes={len(WEIGHTS)}-", "bytes=-0", f"bytes={10**18}-{10**18}"])
def test_a_range_beyond_the_end(client: TestClient, job_id: str, range_: str) -> None:
    answer = client.get(f"/jobs/{job_id}/checkpoints/9/model", headers={"range": range_})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["content-range"] == f"bytes */{len(WEIGHTS)}"


@pytest.mark.parametrize(
    "range_", ["bytes=5-4", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,4-5", "bytes=1", "bytes=--1"]
)
def test_what_is_no_single_range_gives_the_whole(client: TestClient, job_id: str, range_: str) -> None:
    answer = client.get(f"/jobs/{job_id}/checkpoints/9/model", headers={"range": range_})
    assert (answer.status_code, answer.content) == (200, WEIGHTS)


def test_a_range_of_another_version_gives_the_whole(client: TestClient, job_id: str) -> None:
    for etag, status in ((f'"{SHA256}"', 206), ('"other"', 200), (f'W/"{SHA256}"', 200)):
        answer = client.get(
            f"/jobs/{job_id}/checkpoints/9/model", headers={"range": "bytes=0-0", "if-range": etag}
        )
        assert answer.status_code == status


def test_who_has_the_weights_gets_no_body(client: TestClient, job_id: str) -> None:
    for call in (client.get, client.head):
        answer = call(
            f"/jobs/{job_id}/checkpoints/9/model",
            headers={"if-none-match": f'"{SHA256}"', "range": "bytes=0-1"},
        )
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", f'"{SHA256}"')


def test_an_unknown_step_is_not_found(client: TestClient, job_id: str) -> None:
    answer = client.get(f"/jobs/{job_id}/checkpoints/7/model")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "/checkpoints lists" in answer.json()["detail"]
    assert client.get(f"/jobs/{job_id}/checkpoints/x/model").status_code == 422
    assert client.get(f"/jobs/{job_id}/checkpoints/0/model").status_code == 422


def test_files_that_this_server_does_not_see(client: TestClient, job_id: str, directory: Path) -> None:
    (directory / MODEL_FILE).unlink()
    answer = client.get(f"/jobs/{job_id}/checkpoints/9/model")
    assert (answer.status_code, answer.json()["code"]) == (404, "checkpoint_absent")
    assert "HALFSTEP_DATA_DIR" in answer.json()["detail"]
    assert client.head(f"/jobs/{job_id}/checkpoints/9/model").status_code == 404


@pytest.mark.parametrize("kept_in", ["remote"], indirect=True)
def test_a_store_that_does_not_answer_is_said_to_be_away(
    client: TestClient, job_id: str, store: Store
) -> None:
    store.fails("open", None, ConnectionError("refused by me:word@host"))
    answer = client.get(f"/jobs/{job_id}/checkpoints/9/model")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "2"
    assert "word" not in answer.text
    assert [item["step"] for item in client.get(f"/jobs/{job_id}/checkpoints").json()["items"]] == [9, 6]
    store.recover()
    assert client.get(f"/jobs/{job_id}/checkpoints/9/model").content == WEIGHTS


@pytest.mark.parametrize("kept_in", ["remote"], indirect=True)
def test_files_of_before_there_was_a_store_are_still_served(
    client: TestClient, job_id: str, directory: Path, settings: Settings, store: Store
) -> None:
    here = settings.data_dir / directory.relative_to(store.directory)
    here.parent.mkdir(parents=True)
    directory.rename(here)
    assert client.get(f"/jobs/{job_id}/checkpoints/9/model").content == WEIGHTS


@pytest.mark.parametrize("kept_in", ["disk"], indirect=True)
def test_a_link_to_elsewhere_is_not_followed(
    client: TestClient, job_id: str, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_bytes(WEIGHTS)
    (directory / MODEL_FILE).unlink()
    (directory / MODEL_FILE).symlink_to(secret)
    assert client.get(f"/jobs/{job_id}/checkpoints/9/model").status_code == 404


@pytest.mark.parametrize("at", [0, 1_048_575, 1_048_576, len(WEIGHTS) - 1])
def test_altered_weights_never_arrive_whole(
    client: TestClient, job_id: str, directory: Path, at: int
) -> None:
    altered = bytearray(WEIGHTS)
    altered[at] ^= 1
    (directory / MODEL_FILE).write_bytes(altered)
    arrived = bytearray()

    def take() -> None:
        with client.stream("GET", f"/jobs/{job_id}/checkpoints/9/model") as answer:
            for piece in answer.iter_raw():
                arrived.extend(piece)

    with pytest.raises(OSError, match="not those that were saved"):
        take()
    assert len(arrived) < len(WEIGHTS)


def test_no_file_stays_open(client: TestClient, job_id: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for headers in ({}, {"range": "bytes=1-2"}, {"range": "bytes=-0"}, {"if-none-match": "*"}):
        client.get(f"/jobs/{job_id}/checkpoints/9/model", headers=headers)
        client.head(f"/jobs/{job_id}/checkpoints/9/model", headers=headers)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@given(
    size=st.integers(0, 50), first=st.integers(0, 60), last=st.integers(0, 60), form=st.sampled_from("ab-")
)
def test_a_part_is_inside_and_what_python_would_slice(size: int, first: int, last: int, form: str) -> None:
    whole = bytes(range(size))
    header, expected = {
        "a": (f"bytes={first}-{last}", whole[first : last + 1]),
        "b": (f"bytes={first}-", whole[first:]),
        "-": (f"bytes=-{last}", whole[size - min(size, last) :]),
    }[form]
    try:
        part = requested(header, None, etag='"e"', size=size)
    except Unsatisfiable:
        assert expected == b""
        return
    if part is None:
        assert form == "a"
        assert last < first
        return
    assert whole[part.start : part.end + 1] == expected
    assert 0 <= part.start <= part.end < size
    assert part.length == len(expected)
