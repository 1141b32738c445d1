"""The whole service on this machine, once: start it, train on handwritten digits over HTTP, stop it.

`make demo` runs this in the virtual environment. Everything is in a private temporary directory and on a
free port; nothing stays behind. Exit code 0 only if the held-out accuracy is reached.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HALFSTEP = Path(sys.executable).with_name("halfstep")
SPEC = Path(__file__).with_name("digits.yaml")
ACCURACY = 0.95
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def main() -> int:
    """Run the demo; its exit code."""
    directory = Path(tempfile.mkdtemp(prefix="halfstep-"))
    log_file = directory / "up.log"
    # A `.env` or settings of the user's own would make this another service: none of them reach it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HALFSTEP_")}
    environment |= {"HALFSTEP_DATA_DIR": str(directory / "data")}
    print("$ halfstep up &")
    with log_file.open("wb") as log:
        service = subprocess.Popen(
            [HALFSTEP, "up", "--port", "0"], env=environment, cwd=directory, stdout=log, stderr=log
        )
    try:
        url = _address(service, log_file)
        environment |= {"HALFSTEP_URL": url}
        print(f"  ready on {url}\n$ halfstep submit examples/{SPEC.name} --watch")
        watched = subprocess.run(
            [HALFSTEP, "submit", SPEC, "--watch"], env=environment, cwd=directory, check=False
        )
        if watched.returncode != 0:
            print(log_file.read_text(errors="replace"), file=sys.stderr)
            return watched.returncode
        accuracy = _accuracy(environment, directory)
    except KeyboardInterrupt:
        return 130
    finally:
        left = _stop(service, directory)
    print(f"\nheld-out accuracy {accuracy:.4f} (at least {ACCURACY} expected)")
    if left:
        print(f"processes left behind: {left}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    print("the service has stopped, and no process of it is left")
    return 0 if accuracy >= ACCURACY else 1


def _address(service: "subprocess.Popen[bytes]", log: Path) -> str:
    """The service's address, once it answers."""
    deadline = time.monotonic() + START_SECONDS
    while service.poll() is None and time.monotonic() < deadline:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("up ") and "ready after" in line:
                return next(word for word in line.split() if word.startswith("http://"))
        time.sleep(0.05)
    print(log.read_text(errors="replace"), file=sys.stderr)
    raise SystemExit("the service did not start; its log is above")


def _accuracy(environment: dict[str, str], directory: Path) -> float:
    def ask(*command: str) -> Any:
        ran = subprocess.run(
            [HALFSTEP, *command, "--json"], env=environment, cwd=directory, check=True, capture_output=True
        )
        return json.loads(ran.stdout)

    [job] = ask("jobs")["items"]  # this service has had one job
    return float(ask("stats", job["id"])["evaluation"]["metrics"]["accuracy"])


def _stop(service: "subprocess.Popen[bytes]", directory: Path) -> list[int]:
    """Stop the service as Ctrl-C does; processes that are still there afterwards, by their data directory."""
    if service.poll() is None:
        service.send_signal(signal.SIGINT)
        try:
            service.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()
    return [] if sys.platform != "linux" else _using(directory)


def _using(directory: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            environment = (process / "environ").read_bytes()
        except OSError:  # another user's, or just ended
            continue
        if os.fsencode(directory) in environment:
            found.append(int(process.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
