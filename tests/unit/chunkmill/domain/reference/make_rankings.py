"""Writes ``rankings.json``: what ir-measures says of 200 rankings. Run it with ir-measures 0.4.3 installed.

The values are in a file because ir-measures compiles C, and a checkout should not need a compiler to test four sums::

    python -m tests.unit.chunkmill.domain.reference.make_rankings
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("rankings.json")
RANKINGS = 200


def judged_ranking(seed: int) -> tuple[list[str], dict[str, float]]:
    """A ranking of 5 to 39 of 40 ids, and 12 grades from 0 to 3, some of them of ids that are not in the ranking."""
    random = np.random.default_rng(seed)
    ids = [f"d{i}" for i in range(40)]
    ranked = [ids[i] for i in random.permutation(40)[: int(random.integers(5, 40))]]
    grades = {ids[i]: float(g) for i, g in zip(random.permutation(40)[:12], random.integers(0, 4, 12), strict=True)}
    return ranked, grades


def measures(ir_measures: Any) -> dict[str, Any]:
    """The names in the file → ir-measures' measures. nDCG takes the grade as the gain, as trec_eval does."""
    return {
        "ndcg_10": ir_measures.nDCG @ 10,
        "ndcg_5": ir_measures.nDCG @ 5,
        "recall_10": ir_measures.R @ 10,
        "recall_20": ir_measures.R @ 20,
        "mrr_10": ir_measures.RR @ 10,
    }


def computed(ir_measures: Any, seed: int) -> dict[str, float]:
    """What ir-measures says of one ranking."""
    ranked, grades = judged_ranking(seed)
    qrels = [ir_measures.Qrel("q", name, int(grade)) for name, grade in grades.items()]
    run = [ir_measures.ScoredDoc("q", name, float(-rank)) for rank, name in enumerate(ranked)]
    wanted = measures(ir_measures)
    theirs = ir_measures.calc_aggregate(list(wanted.values()), qrels, run)
    return {name: float(theirs[measure]) for name, measure in wanted.items()}


if __name__ == "__main__":
    import ir_measures

    FILE.write_text(
        "[\n" + ",\n".join(json.dumps(computed(ir_measures, seed)) for seed in range(RANKINGS)) + "\n]\n",
        encoding="utf-8",
    )
