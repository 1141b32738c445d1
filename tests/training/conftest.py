"""Where the checkpoints of a test are kept: on the disk, or at a remote store behind it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from halfstep.service.files.remote import Mirror
from halfstep.worker.training.checkpoints import writing
from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.checkpoints.writing import CheckpointRef, Payload
from tests.stores import Store, store_in
from tests.training.test_checkpoint import payload


@dataclass(frozen=True)
class Place:
    """One of the two kinds. `directory`: of a job's checkpoints, as the job knows it."""

    root: Path
    directory: Path
    mirror: Mirror | None
    store: Path | None

    def saved(self, step: int = 7, value: float = 1.0, fence: int = 3) -> CheckpointRef:
        return writing.save(self.directory, fence, step, payload(value), mirror=self.mirror).ref

    def kept(self, ref: CheckpointRef) -> CheckpointRef:
        """The same with the path at which its files are."""
        if self.store is None:
            return ref
        return replace(ref, path=self.store / ref.path.relative_to(self.root))

    def load(self, ref: CheckpointRef) -> Payload:
        return load(ref, self.mirror)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with store_in(tmp_path / "store") as made:
        yield made


@pytest.fixture(params=["disk", "mirror"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    root = tmp_path / "data"
    directory = root / "jobs" / "j" / "checkpoints"
    if request.param == "disk":
        return Place(root, directory, None, None)
    store = tmp_path / "store"
    return Place(root, directory, Mirror(f"file://{store}", root, seconds=60), store)
