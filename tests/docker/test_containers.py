"""What can be known of the images and compose files without a container engine: lint, schema, and the
Dockerfiles' own pip lines and entry points, run in fresh environments."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfstep.service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TOOLS = Path(sys.executable).parent
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*[!e]"))
COMPOSE_FILES = sorted(DOCKER.glob("compose*.yaml"))
# compose.shared.yaml only adds to services of compose.yaml.
WHOLE = [path for path in COMPOSE_FILES if path.name != "compose.shared.yaml"]


def services(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["services"]


ALL_SERVICES = [(path.name, name, service) for path in WHOLE for name, service in services(path).items()]
by_service = pytest.mark.parametrize(
    "service", [each[2] for each in ALL_SERVICES], ids=[f"{each[0]}-{each[1]}" for each in ALL_SERVICES]
)


def test_the_files_that_the_tests_look_at_exist() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.api", "Dockerfile.worker"]
    assert [path.name for path in COMPOSE_FILES] == [
        "compose.shared.yaml",
        "compose.workers.yaml",
        "compose.yaml",
    ]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    ran = subprocess.run([TOOLS / "hadolint", path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_files_follow_the_compose_schema(path: Path) -> None:
    command = [str(TOOLS / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@by_service
def test_services_are_hardened(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["init"] is True
    assert "/tmp" in service["tmpfs"]
    if "build" in service:
        text = (DOCKER / Path(service["build"]["dockerfile"]).name).read_text()
        assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    else:
        assert service["user"].split(":")[0] not in ("0", "root")


@by_service
def test_services_say_how_they_are_and_how_they_stop(service: dict[str, Any]) -> None:
    if service.get("restart") == "no":  # the migration ends by itself
        return
    assert "curl" not in json.dumps(service["healthcheck"])
    assert service["healthcheck"]["test"]
    assert service["stop_grace_period"]


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    published = {
        name: service["ports"]
        for name, service in services(DOCKER / "compose.yaml").items()
        if "ports" in service
    }
    assert published == {"api": ["${HALFSTEP_PUBLISH:-127.0.0.1:8000}:8000"]}


def test_parts_start_after_the_migration() -> None:
    parts = services(DOCKER / "compose.yaml")
    for name in ("api", "dispatch", "worker", "worker-cpu"):
        assert parts[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert parts["worker"]["profiles"] == ["gpu"]
    assert parts["worker-cpu"]["profiles"] == ["cpu"]
    assert "deploy" not in parts["worker-cpu"]
    [device] = parts["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_a_stopping_worker_has_time_for_its_drain() -> None:
    for path in WHOLE:
        for name, service in services(path).items():
            if name.startswith("worker"):
                grace = re.fullmatch(
                    r"\$\{HALFSTEP_STOP_GRACE_PERIOD:-(\d+)s\}", service["stop_grace_period"]
                )
                assert grace is not None
                assert int(grace[1]) >= Settings.model_fields["drain_seconds"].default + 5


def test_secrets_are_made_once_and_fit_the_compose_file(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "make-secrets", tmp_path)
    made = []
    for _ in range(2):
        subprocess.run([tmp_path / "make-secrets"], check=True, capture_output=True)
        made.append({path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()})
    assert made[0] == made[1]
    declared = yaml.safe_load((DOCKER / "compose.yaml").read_text())["secrets"]
    assert set(made[0]) == set(declared) == {Path(each["file"]).name for each in declared.values()}
    assert made[0]["database_password"] in made[0]["database_url"]
    assert made[0]["broker_password"] in made[0]["broker_url"]
    assert re.fullmatch(r"tk_[0-9a-f]{64}", made[0]["api_key"])
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    # What the services read are these files' names, and the URLs' hosts are the services' names.
    parts = services(DOCKER / "compose.yaml")
    assert "@postgres:5432/" in made[0]["database_url"]
    assert "@broker:6379/" in made[0]["broker_url"]
    assert {"postgres", "broker"} <= set(parts)
    for service in parts.values():
        for value in (service.get("environment") or {}).values():
            if str(value).startswith("/run/secrets/"):
                assert Path(value).name in service["secrets"]


def test_the_broker_starts_with_the_password_that_compose_gives_it(tmp_path: Path) -> None:
    """The broker's own command line, under the embedded server."""
    from halfstep.service.cli.up.broker import server_binary

    command = services(DOCKER / "compose.yaml")["broker"]["command"]
    password = tmp_path / "broker_password"
    password.write_text("f00")
    path = tmp_path / "b.sock"
    script = command[2].replace("$$", "$").replace("--dir /tmp", f"--dir {tmp_path}")
    script = script.replace("/run/secrets/broker_password", str(password))
    script = script.replace("valkey-server -", f"{server_binary()} - --port 0 --unixsocket {path}")
    server = subprocess.Popen([*command[:2], script], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not path.exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            assert client.recv(100).startswith(b"-NOAUTH")
            client.sendall(b"AUTH f00\r\n")
            assert client.recv(100) == b"+OK\r\n"
    finally:
        server.terminate()
        assert server.wait(timeout=10) == 0  # the shell has become the server: the signal reaches it


@dataclass(frozen=True)
class Image:
    """A Dockerfile's build, done in a virtual environment instead of a container."""

    folder: Path
    python: Path
    entrypoint: list[str]
    command: list[str]
    settings: dict[str, str]

    def environment(self, **settings: str) -> dict[str, str]:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key != "PYTHONPATH" and not key.startswith("HALFSTEP_")
        }
        path = f"{self.python.parent}:{os.environ['PATH']}"
        return {**inherited, **self.settings, "PATH": path, **settings}

    def run(self, *arguments: str, **settings: str) -> str:
        ran = subprocess.run(
            [*self.entrypoint, *arguments], env=self.environment(**settings), cwd=self.folder,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def has(self, module: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-I", "-c", code], check=False).returncode == 0


def build(dockerfile: Path, folder: Path) -> Image:
    """Follow COPY and the pip line of the first stage; take ENV, ENTRYPOINT and CMD of the last."""
    lines = [
        line
        for line in re.sub(r"\\\n", " ", dockerfile.read_text()).splitlines()
        if line and not line.startswith("#")
    ]
    source = folder / "source"
    source.mkdir()
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    settings: dict[str, str] = {}
    entrypoint: list[str] = []
    command: list[str] = []
    pip_lines = 0
    for line in lines:
        keyword, _, rest = line.partition(" ")
        if keyword == "COPY" and not rest.startswith("--from"):
            *names, target = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(
                        ROOT / name,
                        source / target,
                        symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"),
                    )
                else:
                    shutil.copy(ROOT / name, source / target)
        elif keyword == "RUN" and "pip install" in rest:
            pip_lines += 1
            clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            path = f"{venv / 'bin'}:{os.environ['PATH']}"
            subprocess.run(
                ["sh", "-ec", rest], cwd=source, env={**clean, "PATH": path}, check=True, timeout=900
            )
        elif keyword == "ENV":
            for item in rest.split():
                if item.startswith("HALFSTEP_"):
                    name, _, text = item.partition("=")
                    settings[name] = text
        elif keyword == "ENTRYPOINT":
            entrypoint = json.loads(rest)
        elif keyword == "CMD":
            command = json.loads(rest)
    assert pip_lines == 1
    shutil.rmtree(source)  # what runs is what was installed
    work = folder / "work"
    work.mkdir()
    return Image(
        work, venv / "bin" / "python", [str(venv / "bin" / entrypoint[0]), *entrypoint[1:]], command, settings
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_api_image_serves_without_torch(tmp_path: Path) -> None:
    image = build(DOCKER / "Dockerfile.api", tmp_path)
    for absent in ("torch", "numpy", "halfstep.worker"):
        assert not image.has(absent)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    key = "tk_" + "a1" * 32
    secret = tmp_path / "api_key"
    secret.write_text(key + "\n")
    settings = {
        "HALFSTEP_DATA_DIR": str(tmp_path / "data"),
        "HALFSTEP_PORT": port,
        "HALFSTEP_BROKER_URL": "redis://127.0.0.1:1",
    }
    # As in the image: on every address, which it refuses without a key.
    assert image.settings["HALFSTEP_HOST"] == "0.0.0.0"
    image.run("migrate", **settings)
    refused = subprocess.run(
        [*image.entrypoint, *image.command], env=image.environment(**settings), cwd=image.folder,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "key" in refused.stdout + refused.stderr
    image.run("migrate", HALFSTEP_BOOTSTRAP_KEY_FILE=str(secret), **settings)
    server = subprocess.Popen(
        [*image.entrypoint, *image.command], env=image.environment(**settings), cwd=image.folder
    )
    try:
        answer = _get(f"http://127.0.0.1:{port}/health/live", server)
        assert json.loads(answer)["status"]
        jobs = urllib.request.Request(
            f"http://127.0.0.1:{port}/jobs", headers={"authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(jobs, timeout=10) as page:
            assert json.load(page)["items"] == []
        image.run("health", "api", **settings)
        image.run("health", "dispatch", **settings)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_worker_image_has_what_a_worker_needs(tmp_path: Path) -> None:
    image = build(DOCKER / "Dockerfile.worker", tmp_path)
    assert image.command == ["worker"]
    assert "Run jobs on this machine's device" in image.run(*image.command, "--help")
    for needed in ("torch", "sklearn", "safetensors", "halfstep.worker.job.child", "halfstep.worker.app"):
        assert image.has(needed)
    code = (
        "import halfstep.worker.app, halfstep.worker.job.child, torch; print(torch.__version__.split('+')[0])"
    )
    ran = subprocess.run(
        [image.python, "-I", "-c", code], env=image.environment(), capture_output=True, text=True, check=False
    )
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert ran.stdout.strip() == pinned[1], ran.stderr


def _get(url: str, server: "subprocess.Popen[bytes]") -> bytes:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bytes(answer.read())
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
