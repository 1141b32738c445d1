"""HEAD is answered wherever GET is, 405 names every method, and paths in answers have a proxy's prefix."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from halfstep.service.api import create_app
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database

from .conftest import SPEC, Trainer

Submit = Callable[..., str]
# Of an answer that differs from one moment to the next, or from one request to the next.
OF_THE_MOMENT = {"x-request-id", "content-length"}


def paths_with_get(client: TestClient, job_id: str) -> list[str]:
    document = client.get("/openapi.json").json()
    found = [path for path, taken in document["paths"].items() if "get" in taken]
    filled = [
        path.replace("{job_id}", job_id).replace("{step}", "2").replace("{name}", "held_out/loss")
        for path in found
    ]
    assert not any("{" in path for path in filled), "a new path parameter needs a value here"
    return [*filled, "/openapi.json", "/docs"]


@pytest.fixture
def job_id(submit: Submit, trainer: Trainer) -> str:
    made = submit()
    fence = trainer.claim(made)
    trainer.steps(made, fence, 1, 2)
    trainer.checkpoint(made, fence, 2)
    return made


def test_head_is_get_without_a_body_on_every_route(client: TestClient, job_id: str) -> None:
    paths = paths_with_get(client, job_id)
    assert len(paths) >= 14
    for path in paths:
        head = client.head(path)
        if path.endswith("/stream"):  # its GET goes on until the job ends
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"].startswith("text/event-stream")
            continue
        get = client.get(path)
        assert head.status_code == get.status_code, path
        assert head.content == b"", path
        for name in head.headers.keys() - OF_THE_MOMENT:
            if name == "etag" and path in ("/jobs", "/workers"):
                continue
            assert head.headers[name] == get.headers[name], (path, name)


def test_head_keeps_the_length_of_the_body_and_the_etag(client: TestClient, job_id: str) -> None:
    head, get = (getattr(client, method)(f"/jobs/{job_id}/stats") for method in ("head", "get"))
    assert head.headers["content-length"] == str(len(get.content))
    assert head.headers["etag"] == get.headers["etag"]
    unchanged = client.head(f"/jobs/{job_id}/stats", headers={"if-none-match": head.headers["etag"]})
    assert unchanged.status_code == 304


@pytest.mark.parametrize("path", ["/nothing", "/jobs/not-a-job/stats", "/jobs?limit=x"])
def test_head_fails_as_get_does(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code
    assert head.status_code >= 400
    assert head.content == b""


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/jobs", "GET, HEAD, POST"),
        ("/jobs/{id}", "DELETE, GET, HEAD"),
        ("/jobs/{id}/cancel", "POST"),
        ("/jobs/{id}/stats", "GET, HEAD"),
        ("/health/live", "GET, HEAD"),
        ("/docs", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS"])
def test_a_wrong_method_is_told_every_right_one(
    client: TestClient, path: str, allowed: str, method: str
) -> None:
    answer = client.request(method, path.format(id="01a20950-2beb-7028-96c2-23b1d4ae2966"))
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    assert answer.json()["detail"] == f"This path does not take {method}; it takes {allowed}."


def test_head_where_there_is_no_get_names_head_as_the_wrong_method(client: TestClient) -> None:
    answer = client.head("/jobs/01a20950-2beb-7028-96c2-23b1d4ae2966/cancel")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


@pytest.fixture
def prefixed(settings: Settings, database: Database, client: TestClient) -> TestClient:
    """The API behind a proxy that serves it under /halfstep."""
    app = create_app(settings.model_copy(update={"root_path": "/halfstep"}), database)
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))


@pytest.mark.parametrize("left", ["/halfstep", ""], ids=["prefix left in place", "prefix taken away"])
def test_behind_a_proxy_every_path_in_an_answer_has_the_prefix(prefixed: TestClient, left: str) -> None:
    with prefixed as client:
        made = client.post(f"{left}/jobs", json=SPEC)
        assert made.status_code == 202
        job_id = made.json()["id"]
        assert made.headers["location"] == f"/halfstep/jobs/{job_id}"
        assert client.get(f"{left}/jobs/{job_id}").json()["id"] == job_id
        cancelled = client.post(f"{left}/jobs/{job_id}/cancel")
        assert cancelled.status_code == 200
        again = client.post(f"{left}/jobs/{job_id}/retry")
        assert again.headers["location"] == f"/halfstep/jobs/{again.json()['id']}"
        missing = client.get(f"{left}/nothing").json()
        assert missing["instance"] == "/halfstep/nothing"
        assert missing["detail"] == "No such path; /halfstep/openapi.json lists them."
        refused = client.put(f"{left}/jobs")
        assert (refused.status_code, refused.json()["instance"]) == (405, "/halfstep/jobs")
        assert refused.headers["allow"] == "GET, HEAD, POST"
        assert client.head(f"{left}/health/live").status_code == 200
        assert client.get(f"{left}/openapi.json").json()["servers"] == [{"url": "/halfstep"}]


def test_without_a_prefix_the_document_names_no_server(client: TestClient) -> None:
    assert "servers" not in client.get("/openapi.json").json()


@pytest.mark.parametrize(("given", "kept"), [("", ""), ("/", ""), ("/a", "/a"), ("/a/b/", "/a/b")])
def test_a_prefix_is_a_path(given: str, kept: str, settings: Settings) -> None:
    assert Settings(data_dir=settings.data_dir, root_path=given).root_path == kept


@pytest.mark.parametrize("given", ["a", "http://host/a", "/a b", "/a?b", "/a//b", "/ä", "/../a?"])
def test_what_is_no_path_is_no_prefix(given: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match="HALFSTEP_ROOT_PATH must be a path such as /halfstep"):
        Settings(data_dir=settings.data_dir, root_path=given)
