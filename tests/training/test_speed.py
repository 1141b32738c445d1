"""A device's speed by precision: measured, remembered on disk, and measured anew when that cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfstep.service.contract.speed import DtypeSpeed
from halfstep.worker.training.device import speed

CPU = torch.device("cpu")
FOUND = {
    dtype: DtypeSpeed(matmul=1.0, convolution=0.5, matmul_gflops=100.0, convolution_gflops=50.0)
    for dtype in ("float32", "float16", "bfloat16")
}


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices measured, instead of a second's work each."""
    done: list[torch.device] = []

    def measure(device: torch.device) -> dict[str, DtypeSpeed]:
        done.append(device)
        return FOUND

    monkeypatch.setattr(speed, "measure", measure)
    return done


def test_every_precision_is_measured_in_both_kinds_of_work() -> None:
    found = speed.measure(CPU)
    assert set(found) == {"float32", "float16", "bfloat16"}
    assert (found["float32"].matmul, found["float32"].convolution) == (1.0, 1.0)
    for figures in found.values():
        assert figures.matmul == pytest.approx(
            figures.matmul_gflops / found["float32"].matmul_gflops, rel=0.02
        )
        assert figures.convolution == pytest.approx(
            figures.convolution_gflops / found["float32"].convolution_gflops, rel=0.02
        )


def test_the_next_process_finds_what_was_measured(tmp_path: Path, measurements: list[torch.device]) -> None:
    first = speed.device_speeds(CPU, tmp_path / "new")
    assert speed.device_speeds(CPU, tmp_path / "new") == first == FOUND
    assert len(measurements) == 1
    assert [file.suffix for file in (tmp_path / "new").iterdir()] == [".json"]


@pytest.mark.parametrize("what", ["threads", "torch", "processor"])
def test_another_device_torch_or_thread_count_is_measured_for_itself(
    what: str, tmp_path: Path, measurements: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed.device_speeds(CPU, tmp_path)
    threads = torch.get_num_threads()
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0.0")
    else:
        monkeypatch.setattr(speed, "_processor", lambda: "another")
    speed.device_speeds(CPU, tmp_path)
    assert len(measurements) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("100.0", "NaN"),
        lambda text: text.replace("100.0", "-1.0"),
        lambda text: text.replace("100.0", '"fast"'),
        lambda text: text.replace("matmul_gflops", "matmul_flops"),
        lambda text: text.replace('"bfloat16"', '"int8"'),
        lambda text: json.dumps(json.loads(text) | {"key": "another device"}),
    ],
    ids=["empty", "cut", "list", "nan", "negative", "text", "field", "dtype", "key"],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[str], str], tmp_path: Path, measurements: list[torch.device]
) -> None:
    speed.device_speeds(CPU, tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert speed.device_speeds(CPU, tmp_path) == FOUND
    assert len(measurements) == 2
    assert file.read_text() == whole
    file.write_bytes(b"\xff\x00")
    assert speed.device_speeds(CPU, tmp_path) == FOUND


def test_a_place_that_cannot_be_written_costs_the_measurement_alone(
    tmp_path: Path, measurements: list[torch.device]
) -> None:
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        assert speed.device_speeds(CPU, tmp_path / "file") == FOUND
    assert len(measurements) == 2


def test_a_write_that_fails_leaves_no_debris_and_the_old_file(
    tmp_path: Path, measurements: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed.device_speeds(CPU, tmp_path)
    [file] = tmp_path.iterdir()
    file.write_text("damaged")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speed.os, "replace", full)
    assert speed.device_speeds(CPU, tmp_path) == FOUND
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "damaged"
