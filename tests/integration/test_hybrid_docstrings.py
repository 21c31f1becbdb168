"""Hybrid search on real English with a real model: docstrings of Python's library, asked for by their first lines."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.mixing import MIN_QUERIES
from chunkmill.domain.ranking import ndcg_at, paired_bootstrap
from chunkmill.domain.spaces import OnLong
from chunkmill.store.write import write_vectors
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.support.waiting import PATIENCE


def docstrings(n: int) -> dict[str, tuple[str, str]]:
    """Of ``n`` functions, classes and modules, which chance chooses, the summary and the rest of the docstring."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    known: dict[str, str] = {}
    for file in sorted([*folder.glob("*.py"), *folder.glob("[a-z]*/__init__.py")]):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            summary, _, rest = (text or "").partition("\n\n")
            summary = " ".join(summary.split())
            if 20 <= len(summary) <= 200 and len(rest) >= 80:
                known.setdefault(summary, rest)
    chosen = np.random.default_rng(0).permutation(len(known))[:n]
    pairs = list(known.items())
    return {f"d{i}": pairs[i] for i in sorted(chosen)}


@pytest.fixture
def answering(context: WorkerContext) -> Iterator[WorkerContext]:
    responder = EmbedResponder(context)
    responder.start()
    yield context
    responder.stop()


@pytest.mark.parametrize("n", [pytest.param(60, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.slow)])
def test_hybrid_is_not_below_the_vectors_by_more_than_its_bound(
    n: int, client: Client, db: sa.Engine, answering: WorkerContext, tmp_path: Path
) -> None:
    docs = docstrings(n)
    assert len(docs) == n
    client.enqueue(((name, rest) for name, (_, rest) in docs.items()), collection="docs")
    client.enqueue([("other", "another text about nothing")], collection="others")
    space = client._space(None, OnLong.TRUNCATE)
    texts = list(dict.fromkeys(rest for _, rest in docs.values()))
    made = answering.engines.for_space(space).embed(texts)
    with db.begin() as conn:
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [content_hash(text) for text in texts],
            made.n_tokens,
            made.truncated,
            np.asarray(made),
        )
    client.keywords("docs", language="english")
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text("".join(json.dumps({"_id": name, "text": docs[name][0]}) + "\n" for name in docs))
    qrels.write_text("".join(f"{name}\t{name}\t1\n" for name in docs))
    client.golden("docs").load(queries, qrels)
    tuning = client.tune_search("docs", timeout=PATIENCE)
    assert tuning.n == n >= MIN_QUERIES
    assert tuning.low <= tuning.gain <= tuning.high
    assert tuning.high > 0
    assert (tuning.alpha is None) == (tuning.low <= 0 or tuning.best_alpha == 1)
    assert tuning.keyword > 0.4
    if n == 500:
        # As in the study that decision 70 cites: words help, and ranks alone lose what the scores say.
        assert tuning.alpha is not None
        assert 0.5 <= tuning.alpha <= 0.95
        assert tuning.rrf < tuning.mix
        assert tuning.curve[0.5] < tuning.curve[0.8] > tuning.dense
    # What was judged is what a search finds.
    some = list(docs)[:: n // 20]
    ndcg = {
        hybrid: [
            ndcg_at(
                10,
                [
                    hit.chunk_id
                    for hit in client.search(docs[name][0], collection="docs", hybrid=hybrid, timeout=PATIENCE)
                ],
                {name: 1.0},
            )
            for name in some
        ]
        for hybrid in (None, False, tuning.best_alpha)
    }
    assert ndcg[None] == (ndcg[False] if tuning.alpha is None else ndcg[tuning.best_alpha])
    assert paired_bootstrap(ndcg[None], ndcg[False]).high >= 0
