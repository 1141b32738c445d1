"""Records what version 0.1 answers about the frozen installation, on SQLite and, to compare, on PostgreSQL.

    python -m tests.frozen.recording CHECKOUT_OF_0.1/.venv/bin/python

It writes `data/answers.json.xz` and `data/statements.json.xz`, and stops where the two databases answer
differently.
"""

import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.databases import postgres_database
from tests.frozen import questions
from tests.frozen.exchanges import Exchange, save, serving
from tests.frozen.installation import DATA, Installation, copy_rows, unpack

MODULE = "service.api"
MIGRATE = "import sys; from service.store.schema import migrate; migrate(sys.argv[1])"
STATEMENTS = Path(__file__).parent / "statements.py"


class Recording:
    """What 0.1 did, by group of questions and by kind of database."""

    def __init__(self, python: str, folder: Path) -> None:
        self._python, self._folder = python, folder
        self.statements: dict[str, Any] = {}

    def group(self, name: str, ask: Callable[[questions.Asking], None], *, story: bool) -> list[Exchange]:
        """The exchanges of one group; with `story` after the jobs have gone through their lives."""
        found = []
        for kind in ("sqlite", "postgresql"):
            installed = unpack(self._folder / f"{name}-{kind}")
            if kind == "sqlite":
                found.append(self._one(installed, installed.database_url, ask, kind if story else None))
                continue
            with postgres_database() as url:
                self._run("-c", MIGRATE, url)
                copy_rows(installed.folder / "halfstep.db", url)
                found.append(self._one(installed, url, ask, kind if story else None))
        different = [str(one.ask) for one, other in zip(*found, strict=True) if one != other]
        if different:
            raise SystemExit("the databases answer differently:\n" + "\n".join(different))
        return found[0]

    def _one(
        self, installed: Installation, url: str, ask: Callable[[questions.Asking], None], story: str | None
    ) -> list[Exchange]:
        if story is not None:
            output = self._folder / f"{story}.json"
            self._run(str(STATEMENTS), url, str(installed.folder / "index.json"), str(output))
            self.statements[story] = json.loads(output.read_text(encoding="utf-8"))
        with serving(self._python, MODULE, installed.folder, url, installed.made_at) as server:
            asking = questions.Asking(server.answer, installed.keys, installed.jobs)
            ask(asking)
        return asking.exchanges

    def _run(self, *arguments: str) -> None:
        subprocess.run([self._python, *arguments], check=True, cwd=self._folder)


def main(python: str) -> None:
    """Record everything."""
    with tempfile.TemporaryDirectory() as temporary:
        recording = Recording(python, Path(temporary))
        beside = recording.group("beside", questions.beside, story=True)
        recorded = {
            "reads": recording.group("reads", questions.reads, story=False),
            "writes": recording.group("writes", questions.writes, story=False),
            "beside": beside,
        }
    save(DATA / "answers.json.xz", recorded)
    (DATA / "statements.json.xz").write_bytes(
        lzma.compress(json.dumps(recording.statements).encode(), preset=9)
    )


if __name__ == "__main__":
    main(sys.argv[1])
