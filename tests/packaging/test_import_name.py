"""The package as a user gets it: one import name, beside a `worker.py` and a `service/` of the user's own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD_NAMES = {"service", "worker", "migrations"}
USERS_FILES = {
    "worker.py": "MINE = 'worker'\n",
    "service/__init__.py": "MINE = 'service'\n",
    "migrations.py": "MINE = 'migrations'\n",
}


def library_example() -> str:
    """The README's Python code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return str(code)


def run(python: Path, *arguments: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built in a copy: in the tree itself, setuptools would pack what an earlier build has left in build/.
    folder, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("src", *OLD_NAMES):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    built = run(
        Path(sys.executable), "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, tree, cwd=folder
    )
    assert built.returncode == 0, built.stderr
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def users_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, and this one's libraries by path alone."""
    venv = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel],
        check=True,
    )
    # Of a directory that is named so, Python reads no .pth file: the editable install here stays out.
    (site_packages(python) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def site_packages(python: Path) -> Path:
    [found] = (python.parents[1] / "lib").glob("python3*/site-packages")
    return found


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    for name, content in USERS_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_wheel_puts_one_name_into_site_packages(users_python: Path) -> None:
    there = {each.name for each in site_packages(users_python).iterdir()} - {"libraries.pth"}
    assert {name for name in there if not name.endswith(".dist-info")} == {"halfstep"}
    assert (
        len([name for name in there if re.fullmatch(r"halfstep-[\d.]+\.dist-info", name)]) == len(there) - 1
    )


def test_the_wheel_has_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("halfstep/")}
    kept = {
        f"halfstep/{path.relative_to(ROOT)}" for folder in OLD_NAMES for path in (ROOT / folder).rglob("*.py")
    }
    assert packed - kept == {"halfstep/__init__.py", "halfstep/components.py", "halfstep/py.typed"}
    assert kept <= packed


def test_the_readme_example_trains_beside_modules_of_those_names(
    users_python: Path, users_folder: Path
) -> None:
    (users_folder / "train.py").write_text(
        library_example() + "\nimport service, worker, migrations\n"
        "assert (service.MINE, worker.MINE, migrations.MINE) == ('service', 'worker', 'migrations')\n"
        "import halfstep; print(halfstep.__file__)\n"
    )
    ran = run(users_python, "train.py", cwd=users_folder)
    assert ran.returncode == 0, ran.stderr
    assert "'current_scale'" in ran.stdout
    assert str(site_packages(users_python)) in ran.stdout


def test_an_editable_install_does_so_too(users_folder: Path) -> None:
    ran = run(
        Path(sys.executable),
        "-c",
        "import worker, halfstep, halfstep.worker.amp; print(worker.MINE, halfstep.__file__)",
        cwd=users_folder,
    )
    assert ran.stdout.split() == ["worker", str(ROOT / "src" / "halfstep" / "__init__.py")], ran.stderr


@pytest.mark.slow
def test_a_users_type_checker_sees_the_types(users_python: Path, users_folder: Path) -> None:
    (users_folder / "typed.py").write_text(
        "from halfstep import MixedPrecisionConfig, MixedPrecisionTrainer\n"
        "from halfstep.components import register_model\n"
        "import worker\n"
        "reveal_type(MixedPrecisionTrainer(MixedPrecisionConfig()).train)\n"
        "reveal_type(register_model)\n"
        "reveal_type(worker.MINE)\n"
        "MixedPrecisionConfig(modus=1)\n"
    )
    ran = run(
        Path(sys.executable), "-m", "mypy", "--strict", "--python-executable", users_python, "typed.py",
        cwd=users_folder,
    )  # fmt: skip
    assert "Any" not in ran.stdout.splitlines()[2], ran.stdout
    assert re.search(r'typed\.py:4: note: Revealed type is "def \(', ran.stdout), ran.stdout
    assert re.search(r'typed\.py:5: note: Revealed type is "def \(', ran.stdout), ran.stdout
    assert 'typed.py:7: error: Unexpected keyword argument "modus"' in ran.stdout, ran.stdout
    assert "Found 1 error" in ran.stdout, ran.stdout


def test_what_a_host_without_torch_is_told() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import halfstep, halfstep.service.api\n"
        "assert 'halfstep.worker' not in sys.modules\n"
        "halfstep.MixedPrecisionTrainer\n"
    )
    ran = run(Path(sys.executable), "-c", code, cwd=ROOT)
    assert ran.returncode == 1
    assert "pip install 'halfstep[worker]'" in ran.stderr.splitlines()[-1]


def test_no_file_here_imports_by_the_old_names() -> None:
    wrong = []
    files = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    assert len(files) > 300
    for name in files:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            else:
                continue
            wrong += [f"{name}:{node.lineno}" for each in names if each.partition(".")[0] in OLD_NAMES]
    assert not wrong


@pytest.mark.parametrize(
    "statement", ["import service", "from worker.amp import manager", "import migrations"]
)
def test_lint_refuses_the_old_names(statement: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--stdin-filename", "tests/anything.py", "-"],
        cwd=ROOT, input=statement + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "TID251" in ran.stdout
    assert f"halfstep.{statement.split()[1].partition('.')[0]}" in ran.stdout
