"""All 25 cells of mode x level on a CPU: each layer's types, what is scaled, warned of or refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from halfstep.service.contract.precision import MixedPrecisionMode, PrecisionLevel
from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.errors import SetupError
from tests.amp.runs import Recorded, make_batches

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
LOW = {"fp16": F16, "bf16": B16, "mixed": B16, "dynamic": B16}
REFUSED = {
    ("manual", "dynamic"),
    ("selective", "fp32"),
    ("adaptive", "fp32"),
    *(("gradient_scaling", level) for level in LOW),
}


class Net(nn.Module):
    """Two linear layers around a normalisation, and a word table."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


class Seen:
    """The types of inputs, weights and outputs of each layer in the last forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.types: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype]] = {}
        self.loss: torch.dtype | None = None
        for name, module in model.named_children():
            module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            self.types[name] = (args[0].dtype, module.weight.dtype, output.dtype)

        return hook

    def criterion(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.loss = output.dtype
        return nn.functional.cross_entropy(output, target)


def start(**fields: Any) -> tuple[Recorded, Seen]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model_seen: list[Seen] = []

    def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return model_seen[0].criterion(output, target)

    run = Recorded(
        MixedPrecisionConfig(**fields),
        model,
        optimizer,
        criterion=criterion,
    )
    # Hooks run in the order of registration: these see what a layer's neighbours see.
    model_seen.append(Seen(model))
    return run, model_seen[0]


def expected_types(mode: str, low: torch.dtype) -> dict[str, tuple[torch.dtype, ...]]:
    if mode == "manual":
        return {"first": (low, low, low), "norm": (F32, F32, low), "second": (low, low, low)}
    if mode == "selective":
        return {"first": (F32, F32, F32), "norm": (F32, F32, F32), "second": (F32, F32, F32)}
    # On a CPU autocast leaves layer_norm in the type it is given.
    return {"first": (F32, F32, low), "norm": (low, F32, low), "second": (low, F32, low)}


@pytest.mark.parametrize("mode", [mode.value for mode in MixedPrecisionMode])
@pytest.mark.parametrize("level", [level.value for level in PrecisionLevel])
def test_cell(mode: str, level: str) -> None:
    fields: dict[str, Any] = {"mode": mode, "precision_level": level}
    if mode == "selective":
        fields["selective_layers"] = ["second"]
    if (mode, level) in REFUSED:
        with pytest.raises(ValidationError) as caught:
            start(**fields)
        assert caught.value.errors()[0]["loc"] == ("precision_level",)
        return
    if mode == "adaptive":
        fields["adaptive_threshold"] = 0.0
    run, seen = start(**fields)
    losses = [run.trainer.train_step(*batch)["loss"] for batch in make_batches(1) * 40]
    run.trainer.flush()
    assert losses[-1] < losses[0]
    warnings = " ".join(event.message for event in run.events if event.type == "warning")
    assert ("slow" in warnings) is (level == "fp16")
    assert ("ignored under BF16" in warnings) is (LOW.get(level) is B16)
    if level == "fp32":
        assert ("nothing is cast" in warnings) is (mode != "gradient_scaling")
        assert seen.types == dict.fromkeys(("first", "norm", "second"), (F32, F32, F32))
        assert {row.compute_dtype for row in run.rows} == {"float32"}
        assert {row.scale for row in run.rows} == {2.0**16 if mode == "gradient_scaling" else 1.0}
        return
    low = LOW[level]
    name = str(low).removeprefix("torch.")
    observed = {layer: seen.types[layer] for layer in seen.types}
    expected = expected_types(mode, low)
    if mode == "manual":
        # Input as it reaches the border of the norm layer; the layer itself computes in FP32.
        assert observed["norm"][1:] == expected["norm"][1:]
        del observed["norm"], expected["norm"]
    assert observed == expected
    assert seen.loss is (low if mode in {"automatic", "adaptive"} else F32)
    steps = [row.compute_dtype for row in run.rows]
    if mode == "adaptive":
        assert steps == ["float32"] * 3 + [name] * 37
    else:
        assert steps == [name] * 40
    scale = 2.0**16 if low is F16 else 1.0
    assert {row.scale for row in run.rows if row.compute_dtype == name} == {scale}
    assert {row.scale for row in run.rows if row.compute_dtype == "float32"} <= {1.0}
    assert {parameter.dtype for group in run.optimizer.param_groups for parameter in group["params"]} == {F32}
    saved = run.trainer.state_dict()["model"]
    assert {value.dtype for value in saved.values()} == {F32}


def test_disabled_is_fp32_in_every_cell() -> None:
    for mode in MixedPrecisionMode:
        for level in PrecisionLevel:
            run, seen = start(mode=mode, precision_level=level, enabled=False)
            run.run(make_batches(1))
            assert set(seen.types.values()) == {(F32, F32, F32)}
            assert (run.rows[0].scale, run.rows[0].compute_dtype) == (1.0, "float32")


@pytest.mark.parametrize("mode", ["automatic", "manual", "selective", "adaptive"])
@pytest.mark.parametrize("level", ["fp16", "bf16"])
def test_fp32_layers_stay_in_fp32_in_every_mode(mode: str, level: str) -> None:
    fields: dict[str, Any] = {"mode": mode, "precision_level": level, "fp32_layers": ["fir*"]}
    if mode == "selective":
        fields["selective_layers"] = ["re:first|second"]
    if mode == "adaptive":
        fields["adaptive_threshold"] = 0.0
    run, _ = start(**fields)
    types: dict[str, torch.dtype] = {}
    run.model.first.register_forward_pre_hook(lambda m, args: types.update(input=args[0].dtype))
    inner = run.model.first.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        output = inner(x)
        types.update(inside=output.dtype, weight=run.model.first.weight.dtype)
        return output

    run.model.first.forward = forward
    run.run(make_batches(8))
    assert not torch.is_autocast_enabled("cpu")
    assert types == {"input": F32, "inside": F32, "weight": F32}
    assert {row.compute_dtype for row in run.rows[4:]} == {{"fp16": "float16", "bf16": "bfloat16"}[level]}


def selective(*patterns: str, field: str = "selective_layers", **fields: Any) -> Recorded:
    if field == "selective_layers":
        fields["mode"] = "selective"
    return start(**{field: patterns}, **fields)[0]


@pytest.mark.parametrize("field", ["selective_layers", "fp32_layers"])
def test_layers_that_do_not_exist_are_an_error_that_lists_the_closest(field: str) -> None:
    with pytest.raises(
        SetupError, match=f"{field}: no layer matches 'secnd'; the closest names are 'second'"
    ):
        selective("secnd", field=field)
    with pytest.raises(SetupError, match="the model's layers are 'first', 'norm', 'second'"):
        selective("xyzzy", field=field)
    with pytest.raises(SetupError, match=r"'re:\(' is no regular expression"):
        selective("re:(", field=field)


def test_a_partial_match_warns() -> None:
    run = selective("second", "third*")
    warnings = [event.message for event in run.events if "third" in event.message]
    assert len(warnings) == 1
    assert "no layer matches 'third*'" in warnings[0]


def test_a_match_takes_its_whole_subtree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 4))
    config = MixedPrecisionConfig(mode="selective", precision_level="bf16", selective_layers=["0"])
    run = Recorded(config, model, torch.optim.AdamW(model.parameters()))
    seen: dict[str, torch.dtype] = {}
    for name in ("0.0", "0.2", "0", "1"):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: seen.update({name: output.dtype})
        )
    run.run(make_batches(1))
    assert seen == {"0.0": B16, "0.2": B16, "0": F32, "1": F32}


class Stack(nn.Module):
    """Layers in a list inside a dict: containers that are never called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])})
        self.out = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.parts["blocks"]:
            x = torch.relu(block(x))
        return self.out(x)


@pytest.mark.parametrize(
    ("fields", "blocks", "out"),
    [
        ({"mode": "selective", "selective_layers": ["parts"]}, B16, F32),
        ({"mode": "selective", "selective_layers": ["parts.blocks"]}, B16, F32),
        ({"mode": "automatic", "fp32_layers": ["parts"]}, F32, B16),
        ({"mode": "manual", "fp32_layers": ["parts.blocks"]}, F32, B16),
        ({"mode": "adaptive", "fp32_layers": ["parts"], "memory_efficiency": False}, F32, B16),
    ],
    ids=str,
)
def test_a_container_that_is_never_called_means_what_it_holds(
    fields: dict[str, Any], blocks: torch.dtype, out: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Stack()
    run = Recorded(
        MixedPrecisionConfig(precision_level="bf16", **fields), model, torch.optim.AdamW(model.parameters())
    )
    # A product's type is that of its operands: seen inside the layer, on this side of every border.
    seen: dict[str, set[torch.dtype]] = {"blocks": set(), "out": set()}
    linear = nn.functional.linear

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        result = linear(x, weight, bias)
        seen["out" if weight.shape[0] == 4 else "blocks"].add(result.dtype)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", product)
        run.run(make_batches(2))
    assert seen == {"blocks": {blocks}, "out": {out}}


def test_the_examples_that_name_layers() -> None:
    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.fc1, self.fc2 = nn.Linear(64, 16), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(
                torch.relu(self.fc1(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1)))
            )

    config = MixedPrecisionConfig(
        mode="selective", precision_level="mixed", selective_layers=["conv1", "conv2", "fc1", "fc2"]
    )
    model = Cnn()
    run = Recorded(config, model, torch.optim.Adam(model.parameters()))
    inside: dict[str, torch.dtype] = {}
    for name, module in model.named_children():

        def spy(x: torch.Tensor, name: str = name, inner: Any = module.forward) -> torch.Tensor:
            output = inner(x)
            inside[name] = output.dtype
            return output

        module.forward = spy
    run.trainer.train_step(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert inside == dict.fromkeys(("conv1", "conv2", "fc1", "fc2"), B16)
    assert all(parameter.dtype is F32 for parameter in model.parameters())
    linear = nn.Sequential(nn.Linear(784, 10))
    with pytest.raises(SetupError, match="'conv1', 'conv2', 'fc1', 'fc2'; the model's layers are '0'"):
        Recorded(config, linear, torch.optim.Adam(linear.parameters()))


def test_weights_already_in_low_precision_are_refused_or_warned_of() -> None:
    model = Net().half()
    with pytest.raises(SetupError, match=r"'first.weight' is in float16"):
        Recorded(MixedPrecisionConfig(), model, torch.optim.SGD(model.parameters(), lr=0.1))
    model = Net().bfloat16()
    run = Recorded(MixedPrecisionConfig(), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert any("stop moving" in event.message for event in run.events)


@pytest.mark.parametrize("level", ["fp16", "bf16"])
def test_a_forward_pass_that_raises_leaves_no_region_open(level: str) -> None:
    run, _ = start(mode="selective", precision_level=level, selective_layers=["second"])
    with pytest.raises(RuntimeError):
        run.trainer.train_step(torch.randn(3, 7), torch.zeros(3, dtype=torch.int64))
    run.model.second.register_forward_pre_hook(lambda m, args: (args[0][:, :3],), prepend=False)
    with pytest.raises(RuntimeError):
        run.trainer.train_step(*make_batches(1)[0])
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "manual", "precision_level": "fp16"},
        {"mode": "selective", "precision_level": "bf16", "selective_layers": ["first"]},
        {"precision_level": "bf16", "fp32_layers": ["second"]},
        {"mode": "adaptive", "precision_level": "bf16", "fp32_layers": ["second"]},
    ],
    ids=["manual", "selective", "automatic", "adaptive"],
)
def test_setting_up_again_starts_from_the_trained_fp32_model(fields: dict[str, Any]) -> None:
    run, _ = start(**fields)
    run.run(make_batches(5))
    trained = {name: value.clone() for name, value in run.trainer.state_dict()["model"].items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.model.modules())
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-2)
    run.trainer.setup_training(run.model, optimizer, nn.CrossEntropyLoss())
    again = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.model.modules())
    assert again == hooks
    for name, value in run.trainer.state_dict()["model"].items():
        assert value.dtype is F32
        assert torch.equal(value, trained[name]), name
    run.rows.clear()
    assert [row.step for row in run.run(make_batches(3))] == [1, 2, 3]
