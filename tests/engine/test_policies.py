"""Promise 7, first half: what happens to a long text is counted, and is what the producer chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.domain.spaces import OnLong
from app.errors import EngineError
from app.models import resolve_model
from workers.engine import Engine
from workers.engine.windows import Frame, cut, split

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
    """The split vector from transformers' own parts: windows, mean pooling, mean weighted by tokens."""
    tokenizer, network = model[0].tokenizer, model[0].model
    first, *middle, last = tokenizer(prompt + text)["input_ids"]
    ahead = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else 0
    step = limit - 2 - ahead
    own = middle[ahead:]
    total, weights = torch.zeros(network.config.hidden_size, dtype=torch.float64), 0
    for start in range(0, len(own), step):
        window = own[start : start + step]
        ids = torch.tensor([[first, *middle[:ahead], *window, last]])
        with torch.inference_mode():
            total += len(window) * network(input_ids=ids).last_hidden_state[0].mean(0).double()
        weights += len(window)
    mean = total / weights
    return (mean / mean.norm()).numpy()


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

    assert engine.spec.long_text == "split"
    assert not engine.embed([LONG]).truncated.any()
    assert engine.embed([LONG], on_long=OnLong.TRUNCATE).truncated.all()


def test_stop_ends_the_stream_between_token_batches(toy_engine: Callable[[str], Engine]) -> None:
    engine = toy_engine("bert-mean")
    answers = iter([False, False, False, True])  # before tokenizing and before each TokenBatch

    taken = list(engine.stream(sample(40), stop=lambda: next(answers)))

    assert len(taken) == 2


def test_every_text_is_in_one_result_once(toy_engine: Callable[[str], Engine]) -> None:
    engine = toy_engine("qwen3-last")
    texts = sample(50)

    results = list(engine.stream(texts, on_long=OnLong.SPLIT))

    assert sorted(np.concatenate([result.indices for result in results]).tolist()) == list(range(len(texts)))
    assert len(results) > 5
    assert all(result.vectors.shape == (len(result.indices), 32) for result in results)


def test_cutting_keeps_special_tokens_on_either_side() -> None:
    ids = np.arange(10, dtype=np.int32)
    right = Frame(prefix=ids[:1], suffix=ids[-2:])
    left = Frame(prefix=ids[:1], suffix=ids[-2:], cut_left=True)

    assert cut(ids, 6, right).tolist() == [0, 1, 2, 3, 8, 9]
    assert cut(ids, 6, left).tolist() == [0, 5, 6, 7, 8, 9]


def test_windows_cover_the_text_once() -> None:
    ids = np.arange(12, dtype=np.int32)
    frame = Frame(prefix=ids[:1], suffix=ids[-1:], prompt=1)

    windows = [window.tolist() for window in split(ids, 6, frame)]

    assert windows == [[0, 1, 2, 3, 4, 11], [0, 1, 5, 6, 7, 11], [0, 1, 8, 9, 10, 11]]
