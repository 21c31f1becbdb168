"""The device itself: memory that runs out, numbers that overflow, passes that do not wait, engines side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.run import TokenBatch
from tests.engine.conftest import sample, stdlib_docstrings
from tests.support.waiting import together

from .conftest import DEVICE, MODELS, assert_equal_in_fp32, cosines, forbid_waits

pytestmark = pytest.mark.gpu

MIB = 2**20


def batch_of(engine: Engine) -> TokenBatch:
    prompt = engine.spec.document_prompt
    rows = [ids[: engine.max_tokens] for ids in engine._tokenizer.encode(sample(20), prompt)]  # type: ignore[index]
    skip = engine._tokenizer.frame(prompt).skip if prompt else 0
    return TokenBatch(rows, np.zeros(len(rows), np.bool_), np.full(len(rows), skip, np.int32))


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_starting_a_pass_does_not_wait_for_the_device(
    name: str, dtype: str, load: Callable[..., Engine], cuda: torch.device
) -> None:
    engine = load(name, dtype)
    batch = batch_of(engine)
    runner = engine._runner
    expected = runner(batch).vectors  # libraries set themselves up at the first pass

    forbid_waits(True)
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=cuda).item()
    first, second = runner.launch(batch), runner.launch(batch)
    forbid_waits(False)

    for started in (first, second):
        assert started.failed is None, started.failed
        outcome = runner.finish(started)
        assert not outcome.failures
        assert cosines(outcome.vectors, expected).min() >= 0.9999


def test_memory_that_runs_out_halves_teaches_and_finishes(
    load: Callable[..., Engine], exact: Callable[[str], Engine], tmp_path: Path, cuda: torch.device
) -> None:
    texts = [f"{copy} {text}" for copy in range(8) for text in stdlib_docstrings()[:700]]
    huge = 8_000_000
    engine = load("all-MiniLM-L6-v2", batch_tokens=huge, learned=tmp_path)
    engine.embed(texts[:4])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    room = torch.cuda.memory_reserved(cuda) + 200 * MIB
    torch.cuda.reset_peak_memory_stats(cuda)
    torch.cuda.set_per_process_memory_fraction(room / total)

    results = list(engine.stream(texts))

    assert not [failure for result in results for failure in result.failures]
    vectors = np.zeros((len(texts), engine.dimensions), np.float32)
    for result in results:
        vectors[result.indices] = result.vectors
    some = slice(0, len(texts), 70)
    assert cosines(vectors[some], exact("all-MiniLM-L6-v2").embed(texts[some]).vectors).min() >= 0.9999
    assert engine.batch_tokens < huge, "no pass was too large: the test's own limit does not bind"
    assert torch.cuda.max_memory_reserved(cuda) <= room
    # The next process on this device starts with the lesson.
    assert load("all-MiniLM-L6-v2", batch_tokens=huge, learned=tmp_path).batch_tokens == engine.batch_tokens


def test_a_vector_that_overflows_is_computed_in_fp32(toy_path: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path("bert-mean"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "intermediate.dense" in name:
            tensors[name] *= 1e6  # past fp16's 65,504, and no trouble to the norm that follows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = sample(10)
    engine = Engine.load(str(folder), device=DEVICE, dtype="fp16")

    vectors = engine.embed(texts).vectors

    assert engine._exact.backend is not None, "nothing overflowed"
    exact = Engine.load(str(folder), device="cpu", dtype="fp32").embed(texts).vectors
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors / lengths, exact / lengths, atol=1e-4, rtol=0)


def test_two_engines_share_a_device(load: Callable[..., Engine], exact: Callable[[str], Engine]) -> None:
    names = ("all-MiniLM-L6-v2", "qwen3-last", "bert-mean")
    engines = {name: load(name) for name in names}
    texts = sample(80)

    def call(name: str, number: int) -> np.ndarray:
        return engines[name].embed(texts, urgent=number == 0).vectors

    asked = [(name, number) for name in names for number in range(3)]
    for (name, _), vectors in zip(asked, together(*[partial(call, *arguments) for arguments in asked]), strict=True):
        assert cosines(vectors, exact(name).embed(texts).vectors).min() >= 0.998


def test_callers_at_once_get_their_own_vectors(load: Callable[..., Engine]) -> None:
    engine = load("bert-mean", "fp32", batch_tokens=64)
    texts = [
        [f"caller {caller} says {number} " + "word " * (number % 7) for number in range(30)] for caller in range(6)
    ]
    expected = [np.vstack([engine.embed([text]).vectors for text in caller_texts]) for caller_texts in texts]

    answers = together(*[partial(engine.embed, texts[caller]) for caller in range(6)])
    for embedded, vectors in zip(answers, expected, strict=True):
        assert_equal_in_fp32(embedded.vectors, vectors)
