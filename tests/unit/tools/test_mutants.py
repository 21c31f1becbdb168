"""The mutants are carried along with the code: each still applies, and its tests are still there."""

from __future__ import annotations

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
