"""The door to a remote store: what it promises of bytes, of time and of silence about credentials."""

import errno
import hashlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.errors import ConfigurationError
from halfstep.service.files.remote import MOST_HANGING, Mirror, MirrorFailed, redacted
from tests.stores import Store, cut, flip, store_in

NAMES = ["model", "state", "manifest"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with store_in(tmp_path / "store") as made:
        yield made


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A directory with three files, below the root `tmp_path / "data"`."""
    directory = tmp_path / "data" / "jobs" / "j" / "one"
    directory.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (directory / name).write_bytes(bytes([number]) * 3_000_000)
    return directory


def described(directory: Path) -> dict[str, tuple[int, str]]:
    found = {name: (directory / name).read_bytes() for name in NAMES}
    return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in found.items()}


def kept(store: Store) -> Path:
    return store.directory / "jobs" / "j" / "one"


def test_files_are_stored_in_order_each_compared_before_the_next(
    tmp_path: Path, store: Store, local: Path
) -> None:
    store.mirror(tmp_path / "data").put(local, described(local))
    assert [call for call in store.calls if call[0] in {"put", "open"}] == [
        (operation, name) for name in NAMES for operation in ("put", "open")
    ]
    assert all((kept(store) / name).read_bytes() == (local / name).read_bytes() for name in NAMES)


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_other_bytes_than_were_sent_are_found_and_nothing_follows(
    tmp_path: Path, store: Store, local: Path, damage: object, number: int
) -> None:
    store.fails("stored", number, damage)  # type: ignore[arg-type]
    with pytest.raises(MirrorFailed, match=f"{NAMES[number]} came back with"):
        store.mirror(tmp_path / "data").put(local, described(local))
    assert [name for operation, name in store.calls if operation == "put"] == NAMES[: number + 1]


@pytest.mark.parametrize(("operation", "number", "begun"), [("makedirs", 0, []), ("put", 1, NAMES[:2])])
def test_a_store_that_hangs_is_given_up_and_nothing_more_is_stored(
    tmp_path: Path, store: Store, local: Path, operation: str, number: int, begun: list[str]
) -> None:
    store.fails(operation, number, store.hang)
    mirror = store.mirror(tmp_path / "data", seconds=0.5)
    with pytest.raises(MirrorFailed, match="no end within"):
        mirror.put(local, described(local))
    [thread] = mirror._hanging
    store.released.set()
    thread.join(20)
    assert not thread.is_alive()
    assert [name for called, name in store.calls if called == "put"] == begun
    store.mirror(tmp_path / "data").put(local, described(local))


def test_no_more_calls_are_begun_than_may_hang(tmp_path: Path, store: Store, local: Path) -> None:
    store.fails("makedirs", None, store.hang)
    mirror = store.mirror(tmp_path / "data", seconds=0.01)
    for _ in range(MOST_HANGING):
        with pytest.raises(MirrorFailed, match="no end within"):
            mirror.put(local, described(local))
    with pytest.raises(MirrorFailed, match="earlier calls have not come back"):
        mirror.put(local, described(local))
    hanging = list(mirror._hanging)
    assert len(hanging) == MOST_HANGING
    store.released.set()
    for thread in hanging:
        thread.join(20)
    assert mirror.names(local) == [], "asked again once they have come back"


def test_what_is_fetched_is_what_is_there_up_to_a_limit(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = store.mirror(tmp_path / "data")
    mirror.put(local, described(local))
    target, later = tmp_path / "target", time.monotonic() + 60
    assert mirror.fetch(local, "state", target, limit=3_000_000, deadline=later)
    assert target.read_bytes() == (local / "state").read_bytes()
    assert mirror.fetch(local, "state", target, limit=10, deadline=later)
    assert 10 < target.stat().st_size < 3_000_000
    assert not mirror.fetch(local, "nothing", target, limit=10, deadline=later)


def test_a_fetch_is_given_up_in_time_and_writes_nothing_more(
    tmp_path: Path, store: Store, local: Path
) -> None:
    mirror = store.mirror(tmp_path / "data")
    mirror.put(local, described(local))
    target = tmp_path / "target"
    store.fails("read", 1, store.hang)
    with pytest.raises(MirrorFailed, match=r"reading .* no end within"):
        mirror.fetch(local, "state", target, limit=3_000_000, deadline=time.monotonic() + 0.5)
    [thread] = mirror._hanging
    store.released.set()
    thread.join(20)
    assert target.stat().st_size < 3_000_000


def test_a_removal_that_fails_as_well_hides_no_failure(tmp_path: Path, store: Store, local: Path) -> None:
    store.fails("put", 1, OSError(errno.ENOSPC, "quota exceeded"))
    store.fails("rm", None, ConnectionError("refused"))
    with pytest.raises(MirrorFailed, match=r"storing .* quota exceeded"):
        store.mirror(tmp_path / "data").put(local, described(local))


def test_a_file_is_read_from_any_place(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = store.mirror(tmp_path / "data")
    (local / "model").write_bytes(bytes(range(256)))
    mirror.put(local, described(local))
    found = mirror.open("jobs/j/one", "model")
    assert found is not None
    file, size = found
    with file:
        file.seek(100)
        assert (size, file.read(3)) == (256, bytes([100, 101, 102]))
    assert mirror.open("jobs/j/one", "nothing") is None


def test_what_a_reader_meets_is_told_like_the_rest(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = store.mirror(tmp_path / "data")
    mirror.put(local, described(local))
    store.fails("open", None, RuntimeError("gone"))
    with pytest.raises(MirrorFailed, match="RuntimeError: gone"):
        mirror.open("jobs/j/one", "model")


def test_a_reader_waits_for_no_call_longer_than_it_may(
    tmp_path: Path, store: Store, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.service.files.remote.READ_SECONDS", 0.2)
    mirror = store.mirror(tmp_path / "data")
    mirror.put(local, described(local))
    found = mirror.open("jobs/j/one", "model")
    assert found is not None
    file, _ = found
    with file:
        store.fails("read", 0, store.hang)
        with pytest.raises(MirrorFailed, match=r"reading .* no end within 0\.2 s"):
            file.read(10)
    store.fails("open", None, store.hang)
    with pytest.raises(MirrorFailed, match=r"reading .* no end within 0\.2 s"):
        mirror.open("jobs/j/one", "model")


def test_removal_begins_with_the_manifest_and_repeats(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = store.mirror(tmp_path / "data")
    mirror.put(local, described(local))
    store.calls.clear()
    mirror.remove(local, first="manifest")
    assert store.calls[0] == ("rm_file", "manifest")
    assert not kept(store).exists()
    assert all((local / name).exists() for name in NAMES)
    mirror.remove(local, first="manifest")
    assert mirror.names(local) == []


def test_a_job_goes_but_for_what_others_refer_to(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = store.mirror(tmp_path / "data")
    for name in ("one", "two", "three"):
        mirror.names(local.parent)  # what was there then is no answer to what is there now
        directory = local.parent / name
        directory.mkdir(exist_ok=True)
        for file in NAMES:
            (directory / file).write_bytes(name.encode())
        mirror.put(directory, described(directory))
    mirror.remove_job("j", ["jobs/j/one"], keep=["jobs/j/two"])
    found = sorted(path.relative_to(store.directory).as_posix() for path in store.directory.rglob("m*"))
    assert found == ["jobs/j/two/manifest", "jobs/j/two/model"]
    mirror.remove_job("j", [], keep=[])
    assert not (store.directory / "jobs" / "j").exists()


@pytest.mark.parametrize("path", ["../other", "/etc", "", "jobs/../../other"])
def test_nothing_outside_is_touched(tmp_path: Path, store: Store, path: str) -> None:
    mirror = store.mirror(tmp_path / "data")
    with pytest.raises(PermissionError, match="outside"):
        mirror.open(path, "model")
    with pytest.raises(PermissionError, match="outside"):
        mirror.remove_job("j", [path], keep=[])
    assert store.calls == []


def test_an_empty_store_is_not_there(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = store.mirror(tmp_path / "data")
    store.directory.joinpath("jobs", "j").mkdir(parents=True)
    assert mirror.names(local.parent) == []
    store.directory.joinpath("jobs", "j").rmdir()
    store.directory.joinpath("jobs").rmdir()
    assert not mirror.is_there()
    mirror.put(local, described(local))
    assert mirror.is_there()
    assert mirror.names(local.parent) == ["one"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("sftp://user:pass@host/directory", "sftp://***@host/directory"),
        ("sftp://user:p@ss/w@host/directory", "sftp://***@host/directory"),
        ("s3://bucket/prefix?token=secret", "s3://bucket/prefix?***"),
        ("file:///directory", "file:///directory"),
    ],
)
def test_a_url_is_shown_without_credentials(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_no_credential_is_in_an_error(tmp_path: Path, store: Store, local: Path) -> None:
    mirror = Mirror(f"faulty://me:pa%20ss@{store.directory}", tmp_path / "data", seconds=60)
    # As libraries do, who know nothing of who reads it.
    told = f"cannot log in to faulty://me:pa%20ss@{store.directory} with 'pa ss'"
    store.fails("makedirs", None, ConnectionError(told))
    with pytest.raises(MirrorFailed) as failure:
        mirror.put(local, described(local))
    assert "cannot log in" in failure.value.message
    assert "pa%20ss" not in str(failure.value)
    assert "pa ss" not in str(failure.value)
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://me:word@place", r"Protocol not known: nosuch.*such as s3://bucket/prefix"),
        ("missing://me:word@place", r"library for missing:// is not installed .*no_such_library.*install"),
    ],
)
def test_a_url_that_nothing_serves_names_setting_and_remedy(url: str, words: str) -> None:
    import fsspec

    fsspec.register_implementation(
        "missing", "no_such_library.FileSystem", clobber=True, errtxt="Install no_such_library"
    )
    with pytest.raises(ConfigurationError, match=words) as refused:
        Mirror(url, Path("/data"), seconds=1)
    assert "HALFSTEP_CHECKPOINT_URL" in str(refused.value)
    assert "word" not in str(refused.value)


def test_what_a_library_says_of_a_url_it_refuses_has_no_credential_in_it() -> None:
    import fsspec

    class Refusing(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no annotations
        protocol = "refusing"

        def __init__(self, **_: Any) -> None:
            raise ValueError("no host in refusing://me:pa%20ss@place, 'pa ss' is no password")

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(
        ConfigurationError, match=r"refusing://\*\*\*@place cannot be used: no host"
    ) as refused:
        Mirror("refusing://me:pa%20ss@place", Path("/data"), seconds=1)
    assert not re.search(r"pa(%20| )ss", str(refused.value))


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigurationError, match=r"HALFSTEP_CHECKPOINT_URL.*halfstep\[remote\]"):
        Mirror("file:///data", Path("/data"), seconds=1)
