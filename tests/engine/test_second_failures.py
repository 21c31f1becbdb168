"""A failure that comes while another one is dealt with: each text still has its own vector or its own reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkmill.domain.spaces import OnLong
from chunkmill.errors import EngineError
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine import engine as engine_module
from chunkmill_workers.engine.windows import Ids

from .conftest import sample
from .faulty import FaultyBackend, Load, has_word, run


def holds_word(engine: Engine, word: str) -> Callable[[Ids], bool]:
    """Is the word among the row's tokens?"""
    (ids,) = engine._tokenizer.encode([word])
    assert isinstance(ids, np.ndarray)
    frame = engine._tokenizer.frame("")
    own = ids[frame.skip : len(ids) - len(frame.suffix)].tolist()
    return lambda row: any(row[at : at + len(own)].tolist() == own for at in range(len(row)))


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_window_without_a_vector_fails_its_text_and_no_other(place: str, load: Load) -> None:
    """Whichever of the windows it is: a mean of the others would be the vector of another text."""
    engine, faulty = load()
    faulty.raises = holds_word(engine, "poison")
    words = "word " * 200
    bad = f"poison {words}" if place == "first" else f"{words} poison"

    vectors: dict[int, np.ndarray] = {}
    failures = []
    for result in engine.stream([words, bad, "short", words + "more"], on_long=OnLong.SPLIT):
        vectors |= dict(zip(result.indices.tolist(), result.vectors, strict=True))
        failures += [(failure.index, failure.code) for failure in result.failures]

    assert failures == [(1, "forward_failed")]
    assert sorted(vectors) == [0, 2, 3]
    faulty.raises = lambda _: False
    expected = engine.embed([words, "short", words + "more"], on_long=OnLong.SPLIT).vectors
    np.testing.assert_allclose(np.stack([vectors[at] for at in (0, 2, 3)]), expected, atol=1e-5)


def test_one_text_that_never_fits_leaves_the_passes_of_the_others_as_long_as_they_were(load: Load) -> None:
    engine, faulty = load()
    faulty.raises = has_word(engine, "poison")
    faulty.error = torch.OutOfMemoryError("tried to allocate 1 TiB")
    texts = [*sample(40), "poison"]

    _, failures = run(engine, texts)

    assert {index: code for index, (code, _) in failures.items()} == {len(texts) - 1: "out_of_memory"}
    assert engine.batch_tokens == 512


def test_a_lesson_counts_for_its_own_model_and_number_format(load: Load, tmp_path: Path) -> None:
    engine, faulty = load(learned=tmp_path)
    faulty.most_tokens = 200
    run(engine, sample(60))

    assert engine.batch_tokens < 512
    assert load(learned=tmp_path)[0].batch_tokens == engine.batch_tokens
    assert load("bf16", learned=tmp_path)[0].batch_tokens == 512
    assert load(learned=tmp_path, name="bert-max")[0].batch_tokens == 512


def test_memory_that_no_text_finds_any_more_blames_no_text(load: Load) -> None:
    """Another process has taken the memory, say: each text would be listed as too large for it."""
    engine, faulty = load()
    faulty.most_tokens = 0

    with pytest.raises(EngineError, match="no longer runs on cpu: OutOfMemoryError"):
        list(engine.stream(sample(5)))
    assert engine.batch_tokens == 512


def test_what_the_second_chance_raised_is_the_reason(load: Load) -> None:
    engine, faulty = load()
    faulty.spoils = has_word(engine, "poison")
    twin = FaultyBackend(faulty._inner)
    twin.raises = has_word(engine, "poison")
    twin.error = RuntimeError("the fp32 kernel did not like these shapes")
    engine._exact.backend = twin

    vectors, failures = run(engine, ["fine", "poison", "good"])

    assert sorted(vectors) == [0, 2]
    assert failures == {1: ("forward_failed", "RuntimeError: the fp32 kernel did not like these shapes")}


def test_after_a_vector_that_was_not_finite_half_precision_takes_no_shortcut(
    toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """Else each such text, for as long as the worker runs, would be computed in both formats."""
    folder = Path(shutil.copytree(toy_path("bert-mean"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".query." in name or ".key." in name:
            tensors[name] *= 12  # scores of several hundred, which the fast attention cannot hold
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = Engine.load(str(folder), device="cpu", dtype="bf16", threads=1)
    first, second = sample(10), sample(20)
    engine.embed(first)
    assert engine._exact.backend is not None, "no vector was not finite"
    engine._exact.backend = twin = FaultyBackend(engine._exact.backend)

    vectors = engine.embed(second).vectors

    assert np.isfinite(vectors).all()
    assert twin.passes == []


class PanicException(BaseException):
    """What a panic in Rust is in Python: no Exception."""


class Panicking:
    """The real tokenizer, which ends as told on texts with a bad word."""

    def __init__(self, inner: Any, error: BaseException) -> None:
        self._inner, self._error = inner, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_batch_fast(self, texts: Sequence[str]) -> Any:
        if any("panic" in text for text in texts):
            raise self._error
        return self._inner.encode_batch_fast(texts)


def test_a_panic_of_the_tokenizer_costs_one_text(load: Load) -> None:
    engine, _ = load()
    expected = engine.embed(["fine", "good"]).vectors
    engine._tokenizer._tokenizer = Panicking(engine._tokenizer._tokenizer, PanicException("index out of bounds"))

    vectors, failures = run(engine, ["fine", "a panic", "good", "one more panic"])

    reason = ("tokenize_failed", "the tokenizer cannot read the text (PanicException)")
    assert failures == {1: reason, 3: reason}
    np.testing.assert_allclose(np.stack([vectors[0], vectors[2]]), expected, atol=1e-5)


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_the_end_of_the_program_is_no_fault_of_a_text(end: type[BaseException], load: Load) -> None:
    engine, _ = load()
    engine._tokenizer._tokenizer = Panicking(engine._tokenizer._tokenizer, end())

    with pytest.raises(end):
        list(engine.stream(["fine", "a panic"]))


def test_a_failure_has_its_texts_index_however_many_calls_of_the_tokenizer_there_were(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_TOKENIZER_CALL", 4)
    engine, faulty = load()
    faulty.raises = has_word(engine, "poison")
    texts = ["first", *sample(12)[:12], "poison", "a lone surrogate \ud800", "last"]

    vectors, failures = run(engine, texts)

    assert {index: code for index, (code, _) in failures.items()} == {13: "forward_failed", 14: "tokenize_failed"}
    assert sorted(vectors) == [*range(13), 15]
