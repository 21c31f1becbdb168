"""`make mutants`: how many small wrong changes to the code do the tests notice?

Each mutant is applied to a copy of the tree, and the tests nearest to it are run. Exits with 1 if one survives, hangs,
breaks its tests or no longer applies.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mutants.catalogue import Mutant, load
from tests.mutants.run import Outcome, Result, failures_without_mutants, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants or areas to run; if omitted, all of them")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="how many mutants run at the same time (default: 2)")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests on the clean tree first")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the tests under way end before this does
    mutants = chosen(load(), args.names)
    console = Console(highlight=False, soft_wrap=True)
    if args.list:
        for mutant in mutants:
            console.print(f"{mutant.area}/{mutant.name}: {mutant.promise}", markup=False)
        return 0
    if not args.unchecked:
        console.print(f"running the tests of {len(mutants)} mutants on the clean tree")
        if failed := failures_without_mutants(mutants, jobs=args.jobs):
            console.print(f"These tests fail without any mutant, so that they prove nothing:\n{failed}", markup=False)
            return 1
    results = []
    for result in run(mutants, jobs=args.jobs):
        results.append(result)
        console.print(
            f"{len(results):4}/{len(mutants)}  {result.outcome:<9}{result.seconds:5.0f} s  "
            f"{result.mutant.area}/{result.mutant.name}  {result.evidence}",
            markup=False,
        )
    console.print(table(results))
    if args.json:
        args.json.write_text(json.dumps([as_json(result) for result in results], indent=1) + "\n")
    return 0 if all(result.noticed for result in results) else 1


def chosen(mutants: list[Mutant], names: list[str]) -> list[Mutant]:
    """The mutants whose own name or area is in ``names``; all of them if ``names`` is empty."""
    unknown = set(names) - {mutant.name for mutant in mutants} - {mutant.area for mutant in mutants}
    if unknown:
        sys.exit(f"There is no mutant and no area named {', '.join(sorted(unknown))}. --list prints all of them.")
    return [mutant for mutant in mutants if not names or mutant.name in names or mutant.area in names]


def table(results: list[Result]) -> Table:
    """For each area: how many mutants, how many were noticed, and how many ended in another way."""
    others = [outcome for outcome in Outcome if outcome is not Outcome.NOTICED]
    drawn = Table("area", "mutants", "noticed", "score", *others)
    for area in [*sorted({result.mutant.area for result in results}), "all"]:
        counts = Counter(result.outcome for result in results if area in (result.mutant.area, "all"))
        total = counts.total()
        noticed = counts[Outcome.NOTICED]
        drawn.add_row(
            area,
            str(total),
            str(noticed),
            f"{noticed / total:.0%}",
            *(str(counts[outcome] or "") for outcome in others),
        )
    return drawn


def as_json(result: Result) -> dict[str, object]:
    return {
        "mutant": f"{result.mutant.area}/{result.mutant.name}",
        "outcome": result.outcome,
        "seconds": round(result.seconds, 1),
        "evidence": result.evidence,
    }


if __name__ == "__main__":
    sys.exit(main())
