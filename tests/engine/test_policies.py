"""Promise 7, first half: what happens to a long text is counted, and is what the producer chose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkmill.domain.spaces import LongText, OnLong
from chunkmill.errors import EngineError
from chunkmill.models import resolve_model
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.windows import Ids
from tests.support.waiting import PATIENCE, running, until

from .conftest import reference, sample

LONG = "a very long text about nothing in particular " * 120


def test_counts_are_true_and_truncation_is_marked(minilm: Engine) -> None:
    texts = ["one two three", LONG, ""]

    result = minilm.embed(texts)

    assert result.n_tokens.tolist() == [5, 8 * 120 + 2, 2]
    assert result.truncated.tolist() == [False, True, False]
    assert result.timings.tokens == 5 + 256 + 2
    assert result.timings.padded_tokens >= result.timings.tokens


def test_a_text_at_the_limit_is_whole(minilm: Engine) -> None:
    at_limit, over = "word " * 254, "word " * 255

    result = minilm.embed([at_limit, over])

    assert result.n_tokens.tolist() == [256, 257]
    assert result.truncated.tolist() == [False, True]
    np.testing.assert_allclose(result.vectors[0], result.vectors[1], atol=1e-5)


def test_reject_names_the_text_and_embeds_its_neighbours(minilm: Engine) -> None:
    texts = ["first", LONG, "third"]

    results = list(minilm.stream(texts, on_long=OnLong.REJECT))

    failures = [failure for result in results for failure in result.failures]
    done = sorted(int(index) for result in results for index in result.indices)
    assert [(failure.index, failure.code) for failure in failures] == [(1, "too_long")]
    assert "962" in failures[0].reason
    assert "256" in failures[0].reason
    assert done == [0, 2]
    with pytest.raises(EngineError, match=r"text 1 of 3.*too_long"):
        minilm.embed(texts, on_long=OnLong.REJECT)


def windows_by_hand(model: Any, text: str, prompt: str, limit: int) -> np.ndarray:
    """The split vector from sentence-transformers' own modules: one forward pass and one pooling per window.

    Windows are equally long, as few as will do, and share an eighth of what a window has room for; the mean counts
    each token of the text once, in halves where two windows hold it.
    """
    transformer, pooling = model[0], model[1]
    first, *middle, last = transformer.tokenizer(prompt + text)["input_ids"]
    ahead = len(transformer.tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else 0
    own, room = middle[ahead:], limit - 2 - ahead
    shared = room // 8
    count = 1
    while count * room - (count - 1) * shared < len(own):
        count += 1
    edges = [number * (len(own) - shared) // count for number in range(count + 1)]
    spans = [range(start, end + shared) for start, end in pairwise(edges)]
    held = [sum(at in span for span in spans) for at in range(len(own))]
    assert min(held) == 1
    total = np.zeros(transformer.model.config.hidden_size)
    for span in spans:
        ids = torch.tensor([[first, *middle[:ahead], *own[span.start : span.stop], last]])
        with torch.inference_mode():
            features = transformer({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            vector = pooling(features | {"prompt_length": 0})["sentence_embedding"][0].double().numpy()
        total += sum(1 / held[at] for at in span) * vector
    mean = total / len(own)
    return mean / np.linalg.norm(mean)


def test_split_averages_windows_by_their_tokens(minilm: Engine) -> None:
    texts = ["short", LONG, *sample(8)]
    model = reference(resolve_model("all-MiniLM-L6-v2").path)

    result = minilm.embed(texts, on_long=OnLong.SPLIT)
    truncating = minilm.embed(texts)

    assert not result.truncated.any()
    np.testing.assert_array_equal(result.n_tokens, truncating.n_tokens)
    long = truncating.truncated
    np.testing.assert_allclose(result.vectors[~long], truncating.vectors[~long], atol=1e-5)
    for index in np.flatnonzero(long):
        expected = windows_by_hand(model, texts[index], "", 256)
        np.testing.assert_allclose(result.vectors[index], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-5)


def test_every_window_has_the_prompt(toy_engine: Callable[[str], Engine], toy_path: Callable[[str], Path]) -> None:
    engine = toy_engine("xlm-roberta-passage")
    text = sample(1)[0]

    result = engine.embed([text], "query", on_long=OnLong.SPLIT)

    assert result.n_tokens[0] > 2 * engine.max_tokens
    expected = windows_by_hand(reference(toy_path("xlm-roberta-passage")), text, "query: ", engine.max_tokens)
    np.testing.assert_allclose(result.vectors[0], expected, atol=1e-5)


def test_the_policy_of_load_is_the_default(toy_path: Callable[[str], Path]) -> None:
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32", on_long=OnLong.SPLIT)

    assert engine.spec.long_text is LongText.SPLIT
    assert not engine.embed([LONG]).truncated.any()
    assert engine.embed([LONG], on_long=OnLong.TRUNCATE).truncated.all()


def test_stop_takes_back_what_waits_and_keeps_what_is_under_way(toy_path: Callable[[str], Path]) -> None:
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32", batch_tokens=256)
    texts = sample(40)
    backend, second_running, go_on = engine._runner.backend, threading.Event(), threading.Event()
    passes = []

    class Held:
        device, packed, dtype, concurrent = backend.device, backend.packed, backend.dtype, False

        def __call__(self, rows: Sequence[Ids], **options: Any) -> TokenVectors:
            passes.append(len(rows))
            if len(passes) == 2:
                second_running.set()
                assert go_on.wait(PATIENCE)
            return backend(rows, **options)

    engine._runner.backend = Held()  # type: ignore[assignment]
    engine._loop._most_threads = 1
    asked = []

    def stop() -> bool:
        """No before tokenizing; yes once the first result is there and the second pass runs."""
        asked.append(True)
        if len(asked) == 1:
            return False
        assert second_running.wait(PATIENCE)
        return True

    def let_go_once_nothing_waits() -> None:
        assert second_running.wait(PATIENCE)
        until(lambda: engine._loop.waiting == 0)
        go_on.set()

    with running(let_go_once_nothing_waits, release=go_on.set):
        taken = list(engine.stream(texts, stop=stop))

    done = np.concatenate([result.indices for result in taken])
    assert len(passes) == 2
    assert len(done) == sum(passes) < len(texts)
    assert engine._loop.waiting == 0
    assert len(engine.embed(texts)) == len(texts), "the engine goes on for others"


def test_a_caller_that_walks_away_leaves_nothing_behind(toy_engine: Callable[[str], Engine]) -> None:
    engine = toy_engine("bert-mean")
    stream = engine.stream(sample(40))
    next(stream)

    stream.close()

    assert engine._loop.waiting == 0
    assert not engine._loop._sources


def test_every_text_is_in_one_result_once(toy_engine: Callable[[str], Engine]) -> None:
    engine = toy_engine("qwen3-last")
    texts = sample(50)

    results = list(engine.stream(texts, on_long=OnLong.SPLIT))

    assert sorted(np.concatenate([result.indices for result in results]).tolist()) == list(range(len(texts)))
    assert len(results) > 5
    assert all(result.vectors.shape == (len(result.indices), 32) for result in results)
