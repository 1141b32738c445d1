"""The precision guide: its snippets run, and it names every field, mode, level and default there is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.service.contract.precision import (
    REFUSED_CELLS,
    MixedPrecisionConfig,
    MixedPrecisionMode,
    PrecisionLevel,
)
from halfstep.service.contract.spec import JobSpec
from halfstep.worker.amp.diagnosis.run_health import QUIET_STEPS
from halfstep.worker.amp.errors import SetupError
from tests.training.jobs import run

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
PROSE = " ".join(GUIDE.split())
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in FENCED if language == "python"]
JSON = [json.loads(code) for language, code in FENCED if language == "json"]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, its header and ruler left out."""
    lines = GUIDE[GUIDE.index(f"{heading}\n") :].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_fence_is_one_that_is_checked() -> None:
    assert {language for language, _ in FENCED} == {"python", "json"}
    assert GUIDE.count("```") == 2 * len(FENCED)
    assert len(PYTHON) == 5
    assert len(JSON) >= 3


def test_the_library_examples_run_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    configs: list[Any] = []
    for code in PYTHON:
        exec(compile(code, "docs/precision.md", "exec"), names)
        configs.append(names.get("config"))
        if "trainer" in names:
            assert names["trainer"].get_mixed_precision_stats()["current_step"] > 0
            assert names["trainer"].get_mixed_precision_stats()["skipped_steps"] == 0
    assert [config.mode for config in configs[1:]] == ["automatic", "adaptive", "manual", "selective"]
    assert "precision 3 after step 3" in capsys.readouterr().out, "the guide says that changes are heard of"


def test_the_selective_example_on_a_model_without_its_layers_says_so() -> None:
    names: dict[str, Any] = {}
    for code in (PYTHON[0], PYTHON[4]):
        exec(compile(code, "docs/precision.md", "exec"), names)
    model = nn.Sequential(nn.Linear(784, 10))
    with pytest.raises(SetupError, match="'conv1', 'conv2', 'fc1', 'fc2'; the model's layers are '0'"):
        names["trainer"].setup_training(model, torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss())


@pytest.mark.parametrize("document", [d for d in JSON if "model" in d])
def test_a_job_runs(tmp_path: Path, document: dict[str, Any]) -> None:
    short = document | {"training": document["training"] | {"max_steps": 3, "evaluate_every_steps": 3}}
    JobSpec.model_validate(document)
    _, recorder = run(JobSpec.model_validate(short), tmp_path)
    assert [row.skipped for row in recorder.rows] == [False] * 3
    config = JobSpec.model_validate(document).precision
    if config.mode is MixedPrecisionMode.SELECTIVE:
        plain = short | {"precision": {"precision_level": "fp32"}}
        _, full = run(JobSpec.model_validate(plain), tmp_path / "full")
        assert recorder.rows[0].loss != full.rows[0].loss, "the layers it names are lowered"


@pytest.mark.parametrize("precision", [d for d in JSON if "model" not in d])
def test_a_precision_runs(tmp_path: Path, precision: dict[str, Any]) -> None:
    spec = {
        "model": {"name": "cnn", "params": {"channels": [4, 4], "hidden": 8}},
        "dataset": {"name": "synthetic", "params": {"samples": 32}},
        "precision": precision,
        "training": {"max_steps": 3},
    }
    _, recorder = run(JobSpec.model_validate(spec), tmp_path)
    assert [row.compute_dtype for row in recorder.rows] == ["float16"] * 3


def test_the_field_table_has_every_field_with_its_default_in_order() -> None:
    rows = table("## The fields")
    assert [row[0].strip("`") for row in rows] == list(MixedPrecisionConfig.model_fields)
    defaults = MixedPrecisionConfig().model_dump(mode="json")
    for name, default, meaning, when in rows:
        shown = json.loads(default.strip("`"))
        assert (shown, type(shown)) == (defaults[name.strip("`")], type(defaults[name.strip("`")])), name
        assert meaning
        assert when


def test_the_cells_have_every_mode_and_level_and_refuse_what_is_refused() -> None:
    heading = "### What each cell runs"
    header = next(line for line in GUIDE[GUIDE.index(heading) :].splitlines() if line.startswith("|"))
    levels = [PrecisionLevel(name) for name in re.findall(r"`(\w+)`", header)]
    assert set(levels) == set(PrecisionLevel)
    rows = table(heading)
    assert [row[0].strip("`") for row in rows] == list(MixedPrecisionMode)
    refused = {
        (MixedPrecisionMode(row[0].strip("`")), level)
        for row in rows
        for level, cell in zip(levels, row[1:], strict=True)
        if cell == "refused"
    }
    assert refused == set(REFUSED_CELLS)
    for mode in MixedPrecisionMode:
        assert f"`{mode}`" in GUIDE[: GUIDE.index(heading)], f"{mode} is among the choices"


def test_the_figures_it_computes_with_are_the_defaults() -> None:
    config = MixedPrecisionConfig()
    wait = round(config.hysteresis / config.overflow_threshold)
    assert f"1 / 0.0001 = {wait:_} steps instead of {config.scale_window}".replace("_", " ") in PROSE
    assert f"`scale_window` ({1 / config.scale_window:g}) or more" in PROSE
    unstable = round(100 * config.overflow_threshold * config.scale_window)
    assert f"by default {unstable} of {config.scale_window}" in PROSE
    assert f"the first in {QUIET_STEPS} steps" in PROSE
    assert f"`{2.0**-25 / config.underflow_threshold:.2f} · sqrt(N)`" in PROSE


def test_its_links_and_plots_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        path, _, anchor = target.partition("#")
        if path:
            assert (ROOT / "docs" / path).is_file(), target
        else:
            assert anchor in anchors, target
    for plot in sorted((ROOT / "docs" / "plots").iterdir()):
        assert f"plots/{plot.name}" in GUIDE, "a plot that no text explains"
        assert plot.stat().st_size < 60_000, plot.name


def test_torchs_rule_is_torchs_rule() -> None:
    """The snippet that claims GradScaler's rule meets the conditions under which it is."""
    [claimed] = [d for d in JSON if d.get("underflow_handling") is False]
    config = MixedPrecisionConfig.model_validate(claimed)
    assert config.hysteresis == 1
    assert config.overflow_threshold >= 1 / config.scale_window
    scaler = torch.amp.GradScaler("cpu")
    assert config.initial_scale == scaler.get_scale()
    assert config.scale_factor == scaler.get_growth_factor() == 1 / scaler.get_backoff_factor()
    assert config.scale_window == scaler.get_growth_interval()
