"""Fixtures of the command line's tests: a scripted service, and the command line as a function."""

from collections.abc import Callable, Iterator

import pytest

from halfstep.service.cli.app import main
from tests.cli.stub import Answer, Asked, Stub

Serve = Callable[[Callable[[Asked], Answer]], Stub]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a scripted service and point HALFSTEP_URL at it."""
    made: list[Stub] = []

    def start(answer: Callable[[Asked], Answer]) -> Stub:
        stub = Stub(answer)
        made.append(stub)
        monkeypatch.setenv("HALFSTEP_URL", stub.url)
        return stub

    yield start
    for stub in made:
        stub.close()


class Ran:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Ran]


@pytest.fixture
def halfstep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `halfstep ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr("sys.argv", ["halfstep", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        captured = capsys.readouterr()
        return Ran(code or 0, captured.out, captured.err)

    return run
