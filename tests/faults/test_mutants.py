"""Each mutant still fits the product, and names faults and invariants that there are; `mutants` runs them."""

import ast

import pytest

from tests.e2e.cluster import ROOT
from tests.faults.checker import INVARIANTS
from tests.faults.kinds import KINDS
from tests.faults.mutants import MUTANTS, Mutant, patched


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
    assert set(mutant.red) <= set(INVARIANTS)
