"""The gate of quality on real English with a real model: what is worse is stopped, and the same model passes.

The collection is the docstrings of Python's library without their summaries, and the summaries are the queries. The
second models are derived from the bundled one, because no other model can be downloaded where the tests run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkmill.domain.comparing import unit
from chunkmill.domain.gates import CollectionMeasurement, Gates, check
from chunkmill.domain.ranking import ndcg_at
from chunkmill.domain.spaces import Precision
from chunkmill.models import resolve_model
from chunkmill.models.locate import bundled_folder
from chunkmill_workers.engine.backends.export import export
from chunkmill_workers.engine.engine import Engine
from tests.integration.test_hybrid_docstrings import docstrings

QUERIES = 500
RUNS = 20
FEWER = 1_500
Vectors = tuple[NDArray[np.float32], NDArray[np.float32]]


def ndcg(vectors: Vectors) -> NDArray[np.float64]:
    """nDCG@10 of each query, whose answer is the document of the same number."""
    queries, documents = (unit(one) for one in vectors)
    scores = queries @ documents.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    return np.array([ndcg_at(10, list(map(str, row)), {str(i): 1.0}) for i, row in enumerate(best)])


def passed(old: NDArray[np.float64], new: NDArray[np.float64]) -> int:
    """How many of 20 runs pass, each with 500 queries that chance chose."""
    n = 0
    for seed in range(RUNS):
        chosen = np.random.default_rng(seed).permutation(len(old))[:QUERIES]
        measured = CollectionMeasurement(chunks=1, missing=0, old_ndcg=tuple(old[chosen]), new_ndcg=tuple(new[chosen]))
        n += check(Gates(canary=False, recall=None, p95_ratio=None), measured)[1].passed
    return n


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_worse_model_is_stopped_in_all_runs_and_the_same_one_in_another_precision_or_backend_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(resolve_model(str(bundled_folder())), "onnx")
    docs = docstrings(100_000)
    assert len(docs) >= 2 * QUERIES
    summaries, rests = ([pair[i] for pair in docs.values()] for i in (0, 1))

    def embedded(engine: Engine, most: int | None = None) -> Vectors:
        made = np.asarray(engine.embed(summaries[:most], "query")), np.asarray(engine.embed(rests[:most]))
        engine.close()
        return made

    folder = str(bundled_folder())
    by_first = tmp_path / "by-first-token"
    shutil.copytree(folder, by_first)
    pooling = by_first / "1_Pooling" / "config.json"
    other = json.loads(pooling.read_text()) | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    pooling.unlink()
    pooling.write_text(json.dumps(other))
    whole = embedded(Engine.load(folder, device="cpu", dtype="fp32"))
    random = np.random.default_rng(0)

    def noisy(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        noise: NDArray[np.float64] = random.normal(0, 0.4, vectors.shape) / np.sqrt(vectors.shape[1])
        return unit(vectors) + noise.astype(np.float32)

    def changed(how: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Vectors:
        return how(whole[0]), how(whole[1])

    old = ndcg(whole)
    worse = {
        "noise": changed(noisy),
        "cut to 128": changed(lambda vectors: vectors[:, :128]),
        "CLS for mean": embedded(Engine.load(str(by_first), device="cpu", dtype="fp32")),
    }
    assert {name: passed(old, ndcg(vectors)) for name, vectors in worse.items()} == dict.fromkeys(worse, 0)
    same = {
        "stored in half precision": changed(lambda vectors: vectors.astype(np.float16).astype(np.float32)),
        "int8": embedded(Engine.load(folder, device="cpu", precision=Precision.INT8)),
        # A processor without bf16 takes long, so that these have fewer documents.
        "bf16": embedded(Engine.load(folder, device="cpu", dtype="bf16"), FEWER),
        "ONNX": embedded(Engine.load(folder, device="cpu", dtype="fp32", backend="onnx"), FEWER),
    }
    for name, vectors in same.items():
        n = len(vectors[0])
        assert passed(ndcg((whole[0][:n], whole[1][:n])), ndcg(vectors)) >= 19, name
