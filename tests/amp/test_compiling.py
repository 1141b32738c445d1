"""A compiled model trains as the plain one, under its own names; one that cannot be compiled trains plain."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.errors import SetupError
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp, make_norm_net

MODES: dict[str, dict[str, Any]] = {
    "automatic": {"precision_level": "bf16"},
    "islands": {"precision_level": "fp16", "fp32_layers": ["1"]},
    "manual": {"mode": "manual", "precision_level": "bf16"},
    "selective": {"mode": "selective", "precision_level": "bf16", "selective_layers": ["0", "4"]},
    "adaptive": {"mode": "adaptive", "precision_level": "bf16", "adaptive_threshold": 0.0},
    "gradient_scaling": {"mode": "gradient_scaling", "precision_level": "fp32"},
}

compile_with_torch: Any = torch.compile


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch's tracer with each traced piece run as it is: bits comparable to eager. Holds the pieces."""
    pieces: list[Any] = []

    def run_as_traced(graph: Any, _inputs: Any) -> Any:
        pieces.append(graph)
        return graph.forward

    compile_pieces = lambda model, mode: compile_with_torch(model, backend=run_as_traced)  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile_pieces)
    return pieces


def start(compiled: str, make: Callable[[], nn.Module] = make_norm_net, **fields: Any) -> Recorded:
    model = make()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    run = Recorded(MixedPrecisionConfig(**fields), model, optimizer, compile=compiled)
    torch.manual_seed(7)
    return run


def assert_same(left: Recorded, right: Recorded) -> None:
    assert [(row.loss, row.grad_norm, row.scale, row.skipped, row.compute_dtype) for row in left.rows] == [
        (row.loss, row.grad_norm, row.scale, row.skipped, row.compute_dtype) for row in right.rows
    ]
    theirs = right.model.state_dict()
    for name, value in left.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def unavailable(run: Recorded) -> list[str]:
    return [event.message for event in run.events if event.data.get("code") == "compile_unavailable"]


@pytest.mark.parametrize("mode", sorted(MODES))
def test_each_mode_compiles_to_the_same_training(mode: str, traced: list[Any]) -> None:
    batches = [*make_batches(6), *make_batches(1, size=5), *make_batches(4)]
    eager, compiled = start("off", **MODES[mode]), start("default", **MODES[mode])
    torch.manual_seed(7)
    eager.run(batches)
    torch.manual_seed(7)
    compiled.run(batches)
    assert traced
    assert unavailable(compiled) == []
    assert_same(eager, compiled)
    assert list(compiled.trainer.state_dict()["model"]) == list(eager.trainer.state_dict()["model"])


def test_a_spoilt_layer_is_found_in_a_compiled_model(traced: list[Any]) -> None:
    run = start("default", make_mlp, mode="gradient_scaling", precision_level="fp32")
    batches = make_batches(4)
    run.run(batches[:2])
    with torch.no_grad():
        run.model[2].bias[3] = float("nan")
    run.run(batches[2:])
    (event,) = [event for event in run.events if event.type == "nan"]
    assert (event.step, event.data["layer"], event.data["kind"]) == (3, "2", "forward")
    assert traced


def test_a_model_that_cannot_be_compiled_trains_as_if_nothing_had_been_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def moves_things_and_fails(model: nn.Module, mode: str) -> Callable[[Any], Any]:
        def compiled(batch: Any) -> Any:
            model(batch)  # moves BatchNorm's statistics and draws for dropout
            raise LookupError("no kernel for\nthat")

        return compiled

    eager, compiled = start("off"), start("default")
    torch.manual_seed(7)
    eager.run(make_batches(5))
    monkeypatch.setattr(torch, "compile", moves_things_and_fails)
    torch.manual_seed(7)
    compiled.run(make_batches(5))
    assert_same(eager, compiled)
    (message,) = unavailable(compiled)
    assert "trains uncompiled: LookupError: no kernel for. Set compile to 'off'" in message


def test_a_backward_pass_that_cannot_be_compiled_is_known_before_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def refuse(_graph: Any, _inputs: Any) -> Any:
        raise LookupError("no kernel for this gradient")

    backend = aot_autograd(fw_compiler=lambda graph, _inputs: graph.forward, bw_compiler=refuse)
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_with_torch(model, backend=backend))
    compiled = start("default")
    compiled.run(make_batches(3))
    monkeypatch.undo()
    eager = start("off")
    eager.run(make_batches(3))
    assert len(unavailable(compiled)) == 1
    assert_same(eager, compiled)


def test_the_models_own_error_is_not_the_compilers(traced: list[Any]) -> None:
    run = start("default")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        run.trainer.train_step(torch.randn(8, 5), torch.zeros(8, dtype=torch.int64))
    assert unavailable(run) == []
    run.run(make_batches(2))
    assert traced, "the model is still compiled for batches that fit it"


def test_running_out_of_memory_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda model, mode: exhausted)
    run = start("default")
    with pytest.raises(torch.OutOfMemoryError):
        run.trainer.train_step(*make_batches(1)[0])
    assert unavailable(run) == []


def test_evaluation_runs_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stand_in(model: nn.Module, mode: str) -> Callable[[Any], Any]:
        asked.append(mode)
        return model.forward

    monkeypatch.setattr(torch, "compile", stand_in)
    run = start("max-autotune")
    with run.trainer.evaluation_region() as predict:
        predict(make_batches(1)[0][0])
    assert asked == [], "only a training step asks for the compiled model"
    run.run(make_batches(2))
    assert asked == ["max-autotune-no-cudagraphs"]


def test_an_unknown_way_to_compile_is_refused() -> None:
    with pytest.raises(SetupError, match=r"^compile: 'off', 'default' or 'max-autotune', not 'fast'$"):
        start("fast")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_by_torch_itself_and_resumed() -> None:
    """The real compiler, whose sums round otherwise: close, under the same names, and resumable."""
    settings = {"mode": "gradient_scaling", "precision_level": "fp32"}
    batches = make_batches(12)
    eager, straight = start("off", make_mlp, **settings), start("default", make_mlp, **settings)
    eager.run(batches)
    straight.run(batches)
    first, second = start("default", make_mlp, **settings), start("default", make_mlp, **settings)
    first.run(batches[:5])
    assert second.trainer.load_state_dict(first.trainer.state_dict()) == []
    second.run(batches[5:])
    assert unavailable(straight) == unavailable(second) == []
    assert all(name.split(".")[0].isdigit() for name in first.trainer.state_dict()["model"])
    losses = partial(torch.tensor, dtype=torch.float64)
    wanted = losses([row.loss for row in eager.rows])
    torch.testing.assert_close(losses([row.loss for row in straight.rows]), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        losses([row.loss for row in (*first.rows, *second.rows)]), wanted, rtol=1e-4, atol=1e-5
    )
