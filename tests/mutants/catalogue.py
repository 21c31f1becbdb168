"""The mutants on disk: small wrong changes to the code, each of which some test must notice."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One wrong change: ``old`` stands exactly once in ``file`` and is replaced by ``new``.

    ``tests`` are the tests nearest to the clause, as pytest names them: a file, or one test in it. At least one of them
    must fail under the mutant. ``area`` is the name of the TOML file that the mutant is written in.
    """

    area: str
    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Change the file under ``root``. Raises `NoLongerApplies` if the code has moved on."""
        if problem := self.problem(root):
            raise NoLongerApplies(problem)
        path = root / self.file
        path.write_text(path.read_text().replace(self.old, self.new))

    def problem(self, root: Path) -> str | None:
        """Why the mutant cannot be applied to the tree at ``root``; None if it can."""
        if not (root / self.file).is_file():
            return f"{self.file} does not exist"
        times = (root / self.file).read_text().count(self.old)
        if times != 1:
            return f"`old` stands {times} times in {self.file}, not once"
        if self.old == self.new:
            return "`old` and `new` are the same"
        missing = [test for test in self.tests if not (root / test.partition("::")[0]).is_file()]
        return f"{missing[0]} does not exist" if missing else None


class NoLongerApplies(Exception):
    """The mutant's code or tests are not there any more: carry it along, or delete it with its clause."""


def load(folder: Path = FOLDER) -> list[Mutant]:
    """Every mutant in the TOML files of ``folder``, file by file."""
    return [
        Mutant(area=path.stem, **{**entry, "tests": tuple(entry["tests"])})
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["mutant"]
    ]
