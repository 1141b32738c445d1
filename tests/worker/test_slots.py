"""What the environment of a job's process says, by slot."""

from pathlib import Path

import pytest

from service.settings import Settings
from worker.process import Spawner
from worker.slots import build_slots


def environments(tmp_path: Path, **values: object) -> list[dict[str, str]]:
    settings = Settings(data_dir=tmp_path, worker_device="cpu", **values)
    return [slot.environment for slot in build_slots(settings, Spawner())]


def test_cpu_slots_share_the_threads(tmp_path: Path) -> None:
    found = environments(tmp_path, worker_slots=2, worker_threads=3)
    assert [each["OMP_NUM_THREADS"] for each in found] == ["3", "3"]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {""}


def test_what_torch_caches_stays_in_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (found,) = environments(tmp_path)
    assert Path(found["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    (found,) = environments(tmp_path)
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
