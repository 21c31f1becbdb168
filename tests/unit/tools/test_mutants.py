"""The mutants are carried along with the code: each still applies, and its tests are still there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.catalogue import ROOT, Mutant, NoLongerApplies, load

MUTANTS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.area}/{mutant.name}")
def test_a_mutant_applies_to_the_code_as_it_is(mutant: Mutant) -> None:
    assert mutant.problem(ROOT) is None
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


_FUNCTION = re.compile(r'^    \(\n(?: +#.*\n)* +"(\w+)", "|CREATE (?:OR REPLACE )?FUNCTION (\w+)\(', re.MULTILINE)
"""The beginning of a function in a migration: in a list of functions, or in a statement of its own."""


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.file.startswith("alembic/")], ids=lambda mutant: mutant.name
)
def test_a_mutant_of_a_migration_is_in_a_function_that_no_later_one_replaces(mutant: Mutant) -> None:
    """What is replaced would be changed in vain: no test could notice."""
    before, old, _ = (ROOT / mutant.file).read_text().partition(mutant.old)
    functions = [name or other for name, other in _FUNCTION.findall(before + old)]
    for later in sorted((ROOT / "alembic" / "versions").glob("*.py")):
        if functions and later.name > Path(mutant.file).name:
            replaced = {name or other for name, other in _FUNCTION.findall(later.read_text())}
            assert functions[-1] not in replaced, f"{later.name} replaces {functions[-1]}"


def test_names_are_given_once() -> None:
    names = [mutant.name for mutant in MUTANTS] + list({mutant.area for mutant in MUTANTS})
    assert len(set(names)) == len(names)


def test_a_mutant_whose_code_has_moved_on_says_so_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("two, two\n")
    (tmp_path / "test_code.py").touch()

    def mutant(file: str, old: str, new: str, test: str = "test_code.py") -> Mutant:
        return Mutant("area", "name", "A promise.", file, old, new, (test,))

    for wrong, why in {
        mutant("code.py", "two", "2"): "2 times",
        mutant("code.py", "three", "3"): "0 times",
        mutant("gone.py", "two", "2"): "gone.py does not exist",
        mutant("code.py", "two, two", "two, two"): "the same",
        mutant("code.py", "two, two", "2", "test_gone.py::test_x"): "test_gone.py::test_x does not exist",
    }.items():
        with pytest.raises(NoLongerApplies, match=why):
            wrong.apply(tmp_path)
    assert (tmp_path / "code.py").read_text() == "two, two\n"
    mutant("code.py", "two, two", "2").apply(tmp_path)
    assert (tmp_path / "code.py").read_text() == "2\n"
