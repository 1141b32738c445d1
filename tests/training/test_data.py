"""Datasets, their splits, and the order in which a run visits them."""

import gzip
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.worker.training.components import (
    DataRequest,
    Dataset,
    InputKind,
    Kind,
    Task,
    TensorSplit,
    TokenSplit,
    find,
)
from halfstep.worker.training.components.datasets import digits
from halfstep.worker.training.data.batches import Batches
from halfstep.worker.training.data.dataset import epoch_order
from halfstep.worker.training.data.plan import Plan, Position
from halfstep.worker.training.errors import DataError

CPU = torch.device("cpu")


def built(name: str, params: dict[str, Any] | None = None, **request: Any) -> Dataset:
    entry = find(Kind.DATASET, name)
    wanted = DataRequest(**({"inputs": (InputKind.FEATURES,)} | request))
    dataset = entry.build(entry.parse(params or {}), wanted)
    assert isinstance(dataset, Dataset)
    return dataset


def plan(samples: int = 10, **changes: Any) -> Plan:
    values = {"batch_size": 2, "accumulation": 1, "epochs": 1, "max_steps": None} | changes
    return Plan(samples=samples, **values)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first = epoch_order(3, 2, 100)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(epoch_order(3, 2, 100), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(epoch_order(3, 3, 100), first)
    assert not torch.equal(epoch_order(4, 2, 100), first)
    assert torch.equal(first.sort().values, torch.arange(100))


def test_the_order_does_not_change_between_versions() -> None:
    assert epoch_order(0, 1, 8).tolist() == [0, 4, 1, 5, 7, 6, 3, 2]


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    accumulation=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_an_epoch_visits_every_sample_once(
    samples: int, batch_size: int, accumulation: int, seed: int
) -> None:
    split = TensorSplit(torch.arange(samples), torch.arange(samples) * 2)
    made = plan(samples, batch_size=batch_size, accumulation=accumulation)
    batches = Batches(split, made, seed=seed, device=CPU)
    seen = []
    for group in range(made.steps_per_epoch):
        micro = batches.group(Position(1, group))
        assert 1 <= len(micro) <= accumulation
        assert sum(len(x) for x, _ in micro) == batches.samples(Position(1, group))
        for inputs, targets in micro:
            assert 1 <= len(inputs) <= batch_size
            assert torch.equal(inputs * 2, targets)
            seen += inputs.tolist()
    assert sorted(seen) == list(range(samples))
    assert seen == epoch_order(seed, 1, samples).tolist()


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "total"),
    [
        ({}, 5, 5),
        ({"batch_size": 3}, 4, 4),
        ({"batch_size": 3, "accumulation": 3, "epochs": 2}, 2, 4),
        ({"epochs": 3, "max_steps": 7}, 5, 7),
        ({"epochs": 3, "max_steps": 70}, 5, 15),
        ({"epochs": None, "max_steps": 70}, 5, 70),
        ({"excluded": frozenset({Position(1, 0), Position(1, 4), Position(9, 0)})}, 5, 3),
    ],
)
def test_the_length_of_a_job(changes: dict[str, Any], steps_per_epoch: int, total: int) -> None:
    made = plan(10, **changes)
    assert (made.steps_per_epoch, made.total_steps) == (steps_per_epoch, total)


def test_positions_run_through_epochs_and_leave_out_what_is_excluded() -> None:
    made = plan(6, epochs=None, excluded=frozenset({Position(1, 0), Position(1, 2), Position(2, 0)}))
    places = [made.first()]
    for _ in range(3):
        places.append(made.after(places[-1]))
    assert places == [Position(1, 1), Position(2, 1), Position(2, 2), Position(3, 0)]


def test_digits_are_real_and_split_the_same_way_every_time() -> None:
    from sklearn.datasets import load_digits

    flat, image = built("digits"), built("digits", inputs=(InputKind.IMAGE,))
    assert (len(flat.train), len(flat.held_out or ()), flat.info.outputs) == (1438, 359, 10)
    assert isinstance(flat.train, TensorSplit)
    assert isinstance(image.train, TensorSplit)
    assert flat.train.inputs.shape == (1438, 64)
    assert image.train.inputs.shape == (1438, 1, 8, 8)
    assert torch.equal(flat.train.inputs, image.train.inputs.flatten(1))
    known = load_digits()
    assert flat.train.inputs[0].mul(16).tolist() == known.data[0].tolist()
    assert flat.held_out is not None
    held_out = flat.held_out.batch(torch.arange(359))
    assert held_out[0][0].mul(16).tolist() == known.data[4].tolist()
    assert sorted([*flat.train.targets.tolist(), *held_out[1].tolist()]) == sorted(known.target.tolist())
    assert flat.train.fingerprint() == built("digits").train.fingerprint()


def test_text_windows_predict_the_next_byte_and_the_tail_is_held_out(tmp_path: Path) -> None:
    content = bytes(i % 251 for i in range(2000))
    (tmp_path / "b.txt").write_bytes(content[900:])
    (tmp_path / "a.txt").write_bytes(content[:900])
    (tmp_path / "c.bin").write_bytes(b"not this one")
    data = built(
        "text",
        {"root": str(tmp_path), "pattern": "*.txt", "held_out_bytes": 300},
        sequence_length=50,
        text_roots=(tmp_path,),
    )
    assert data.info.task is Task.LANGUAGE
    assert len(data.train) == (1700 - 1) // 50
    inputs, targets = data.train.batch(torch.tensor([0, 3]))
    assert bytes(inputs[1].tolist()) == content[150:200]
    assert bytes(targets[1].tolist()) == content[151:201]
    assert data.held_out is not None
    assert bytes(data.held_out.batch(torch.tensor([0]))[0][0].tolist()) == content[1700:1750]


def test_text_is_the_standard_library_by_default() -> None:
    data = built("text", {"max_bytes": 100_000, "held_out_bytes": 1000}, sequence_length=64)
    assert isinstance(data.train, TokenSplit)
    first = min(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")).read_bytes()
    assert bytes(data.train.tokens[:100].tolist()) == first[:100]
    assert len(data.train.tokens) == 99_000


def test_text_outside_the_allowed_roots_is_refused(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir()
    outside.mkdir()
    (outside / "secret.py").write_bytes(b"x" * 5000)
    (allowed / "link").symlink_to(outside)
    (allowed / "file.py").symlink_to(outside / "secret.py")
    for root in (outside, allowed / ".." / "outside", allowed / "link", Path("/etc"), Path("/")):
        with pytest.raises(DataError, match="may not read"):
            built("text", {"root": str(root)}, text_roots=(allowed,))
    with pytest.raises(DataError, match="no bytes"):  # a link inside to a file outside is not read either
        built("text", {"root": str(allowed)}, text_roots=(allowed,))
    with pytest.raises(DataError, match="none besides the Python standard library"):
        built("text", {"root": str(allowed)})


@pytest.mark.parametrize("pattern", ["../*.py", "/etc/*", "a\\b"])
def test_a_pattern_names_files_only(pattern: str) -> None:
    with pytest.raises(Exception, match="pattern"):
        find(Kind.DATASET, "text").parse({"pattern": pattern})


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x" * 400)
    with pytest.raises(DataError, match="400 bytes"):
        built("text", {"root": str(tmp_path)}, sequence_length=64, text_roots=(tmp_path,))


def test_synthetic_puts_the_fault_at_the_step_asked_for() -> None:
    params = {"samples": 40, "non_finite_steps": [2, 5], "non_finite_value": "inf"}
    data = built("synthetic", params, seed=7, samples_per_step=8)
    made = plan(40, batch_size=4, accumulation=2)
    batches = Batches(data.train, made, seed=7, device=CPU)
    bad = [
        group + 1
        for group in range(5)
        if any(torch.isinf(inputs).any() for inputs, _ in batches.group(Position(1, group)))
    ]
    assert bad == [2, 5]
    with pytest.raises(DataError, match="an epoch has 5 steps"):
        built("synthetic", {"samples": 40, "non_finite_steps": [6]}, seed=7, samples_per_step=8)


def test_synthetic_regression_and_images() -> None:
    data = built(
        "synthetic", {"task": "regression", "outputs": 3, "held_out_samples": 0}, inputs=(InputKind.IMAGE,)
    )
    assert data.info.task is Task.REGRESSION
    assert data.info.shape == (1, 4, 4)
    assert data.held_out is None
    inputs, targets = data.train.batch(torch.tensor([1]))
    assert (inputs.shape, targets.shape, targets.dtype) == ((1, 1, 4, 4), (1, 3), torch.float32)


def test_a_split_must_be_of_one_length_and_not_empty() -> None:
    with pytest.raises(DataError, match="2 inputs and 3 targets"):
        TensorSplit(torch.ones(2), torch.ones(3))
    split = TensorSplit(torch.ones(0), torch.ones(0))
    info = built("digits").info
    with pytest.raises(DataError, match="no training samples"):
        Dataset(train=split, held_out=None, info=info)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: b"",
        lambda packed: packed[: len(packed) // 2],
        lambda packed: gzip.compress(gzip.decompress(packed)[:5000]),
        lambda packed: gzip.compress(gzip.decompress(packed).replace(b"16", b"x", 1)),
        lambda packed: gzip.compress(b"\xff" * 100),
        lambda packed: b"0,1,2",
    ],
    ids=["empty", "cut", "short", "words", "not ascii", "not packed"],
)
def test_a_damaged_digits_file_is_the_datas_fault(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "digits.csv.gz"
    broken.write_bytes(damage(digits._file().read_bytes()))
    monkeypatch.setattr(digits, "_file", lambda: broken)
    with pytest.raises(DataError, match="reinstall scikit-learn"):
        built("digits")
