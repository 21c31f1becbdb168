"""Text to NumPy: our engine beside sentence-transformers on the same texts, both against the machine's own limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.models import DEFAULT_MODEL, resolve_model
from app.models.files import read_json
from benchmarks import flops, peers
from benchmarks.peers import REFERENCE, Embed
from benchmarks.report import Say, document
from benchmarks.stats import Measurement, Target, add_ratios, interleave
from benchmarks.texts import docstrings, of_length
from workers.engine import Engine

DOCSTRINGS, LATENCY, LIMIT = "docstrings", "one short text", "this machine's matrix products"
SHORT_TEXT = "How do I rotate a TLS certificate without downtime?"
CALLS = 20
"""Of a single text per round; the round's figure is their median."""


def run(*, rounds: int, quick: bool, say: Say) -> dict[str, Any]:
    """The gate comes first and warms up; the products are measured in the same rounds, so they share their weather."""
    threads = peers.use_all_cores()
    say("loading models")
    words = ["fp32", *filter(None, [peers.half()])]
    engines = {peers.our_name(engine): engine for engine in map(peers.our_engine, reversed(words))}
    contenders: dict[str, Embed] = {name: _embed(engine) for name, engine in engines.items()}
    contenders |= {f"sentence-transformers {word}": peers.sentence_transformer(word) for word in words}
    config = read_json(resolve_model(DEFAULT_MODEL).transformer / "config.json")
    rates: dict[str, list[float]] = {word: [] for word in words}

    def measure_products(name: str) -> None:
        if name == REFERENCE:  # once per round
            for word in words:
                dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[word]
                rates[word].append(
                    flops.gemm_rate(config, engines[f"chunkmill {word}"].batch_tokens, dtype, peers.device())
                )

    first = next(iter(engines.values()))
    found: list[Measurement] = []
    for group, texts in _workloads(first, quick).items():
        say(f"{group}: cosine gate")
        lengths = np.minimum(first.embed(texts).n_tokens, first.max_tokens).astype(np.int64)
        for rate in rates.values():
            rate.clear()
        found += _measure(group, texts, lengths, contenders, rounds, measure_products, _within(group, say))
        share = flops.text_flops(config, lengths)
        for each in found:
            if each.group == group and not each.refused:
                _add_share(each, share / lengths.sum(), rates[each.name.split()[-1]])
        if group == DOCSTRINGS:
            limits = [Measurement(LIMIT, f"{word} GEMM", "GFLOP/s", [r / 1e9 for r in rates[word]]) for word in words]
    say(LATENCY)
    found += limits + _latency(contenders, rounds)
    add_ratios(found, REFERENCE)
    if len(words) > 1:
        add_ratios(found, f"sentence-transformers {words[1]}", only=f"chunkmill {words[1]}")
    settings = {
        "model": DEFAULT_MODEL,
        "device": first.device,
        "threads": threads,
        "batch_tokens": first.batch_tokens,
        "sentence_transformers_batch": 32 if peers.device() == "cpu" else "32 in fp32, 256 in half precision",
        "tokens": "those that the model sees: special tokens in, padding and what is cut off not",
        "flops": "2 x weights of the layers + 4 x layers x length x hidden per token, held against the GEMM rate",
    }
    return document("engine", found, settings=settings)


def _embed(engine: Engine) -> Embed:
    return lambda texts: engine.embed(texts).vectors


def _within(group: str, say: Say) -> Say:
    return lambda now: say(f"{group}, {now}")


def _workloads(engine: Engine, quick: bool) -> dict[str, list[str]]:
    whole = docstrings(200 if quick else 2_000)
    sample = engine.embed(whole[:100])
    per_word = float(sample.n_tokens.sum()) / sum(len(text.split()) for text in whole[:100])
    return {DOCSTRINGS: whole} | {
        f"{size} texts": of_length(tokens, count // 10 if quick else count, tokens_per_word=per_word)
        for size, tokens, count in (("short", 10, 1_500), ("medium", 140, 250), ("long", 300, 150))
    }


def _measure(
    group: str,
    texts: Sequence[str],
    lengths: NDArray[np.int64],
    contenders: dict[str, Embed],
    rounds: int,
    before: Callable[[str], object],
    say: Say,
) -> list[Measurement]:
    """Gate everyone, then race those that passed."""
    reference = contenders[REFERENCE](texts)
    tokens = int(lengths.sum())
    found = []
    for name, embed in contenders.items():
        refused, facts = peers.gated(name, embed(texts), reference)
        facts |= {"texts": len(texts), "tokens": tokens, "mean_tokens": round(tokens / len(texts), 1)}
        found.append(Measurement(group, name, "tokens/s", [], refused=refused, facts=facts))
    racing = {each.name: (lambda embed=contenders[each.name]: embed(texts)) for each in found if not each.refused}
    seconds = interleave(racing, rounds, say, before=before)
    for each in found:
        each.rounds = [tokens / taken for taken in seconds.get(each.name, [])]
    return found


def _add_share(each: Measurement, flops_per_token: float, rates: Sequence[float]) -> None:
    """Share of the GEMM rate reached, round by round, and the tokens/s that all of it would give."""
    shares = [speed * flops_per_token / rate for speed, rate in zip(each.rounds, rates, strict=True)]
    each.facts["share_of_gemm_rate"] = float(np.median(shares))
    each.facts["tokens_per_second_at_gemm_rate"] = float(np.median(rates) / flops_per_token)


def _latency(contenders: dict[str, Embed], rounds: int) -> list[Measurement]:
    taken: dict[str, list[float]] = {name: [] for name in contenders}

    def contend(name: str) -> None:
        taken[name].append(peers.single_text_ms(lambda: contenders[name]([SHORT_TEXT]), CALLS))

    interleave({name: lambda name=name: contend(name) for name in contenders}, rounds, lambda now: None)  # type: ignore[misc]
    ours = next(iter(contenders))  # the precision a worker on this machine takes by itself
    return [
        Measurement(LATENCY, name, "ms", taken[name], target=Target(10, at_most=True) if name == ours else None)
        for name in contenders
    ]
