"""Each mutant still fits the product, and names faults and invariants that there are; `mutants` runs them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import ROOT
from tests.faults.checker import INVARIANTS
from tests.faults.kinds import KINDS
from tests.faults.mutants import MUTANTS, Mutant, copied, environment_of, patched
from tests.faults.outbox import INVARIANTS as OUTBOX_INVARIANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_the_product_as_it_is_now(mutant: Mutant) -> None:
    texts = patched(mutant, ROOT)
    assert texts
    for file, text in texts.items():
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_names_faults_and_invariants_that_there_are(mutant: Mutant) -> None:
    assert set(mutant.faults) <= set(KINDS)
    assert mutant.red
    assert set(mutant.red) <= set(OUTBOX_INVARIANTS if mutant.outbox else INVARIANTS)


STARTED_BY_A_RUN = """
import subprocess, sys, tempfile
from pathlib import Path

from tests.e2e.cluster import Cluster

cluster = Cluster(Path(tempfile.mkdtemp()), "sqlite://", "redis://127.0.0.1:1/0")
asked = "import halfstep.service.queue as queue; print(queue.__file__, queue.__doc__)"
subprocess.run([sys.executable, "-c", asked], env=cluster.environment, cwd=cluster.folder, check=True)
"""


def test_what_a_run_starts_in_a_copy_is_the_copy(tmp_path: Path) -> None:
    text = (ROOT / "service" / "queue.py").read_text(encoding="utf-8")
    first_line = text.splitlines()[0]
    marked = Mutant(
        "marked", (("service/queue.py", first_line, first_line.replace('"""', '"""Mutant. ')),), (), ()
    )
    tree = tmp_path / "tree"
    tree.mkdir()
    copied(marked, tree)
    done = subprocess.run(
        [sys.executable, "-c", STARTED_BY_A_RUN],
        cwd=tree,
        env=environment_of(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tree}/src/halfstep/service/queue.py Mutant. " in done.stdout
