"""Text to NumPy: our engine beside its peers on the same texts, and both beside the machine's own limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkmill.models import DEFAULT_MODEL
from chunkmill.models.files import read_json
from chunkmill_workers.benchmarks import contest, flops, stats
from chunkmill_workers.benchmarks.contest import Contender, Field, Ground
from chunkmill_workers.benchmarks.names import LATENCY, LIMIT, MEMORY, OUR, REFERENCE, START
from chunkmill_workers.benchmarks.peers.process import PeerError
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.stats import Measurement, Target, add_ratios, in_turns
from chunkmill_workers.benchmarks.texts import docstrings, of_length

DOCSTRINGS = "docstrings"
CALLS = 20
"""Calls with a single text in each round. Their median is the round's figure."""


def run(
    *, rounds: int, quick: bool, say: Say, model: str = DEFAULT_MODEL, only: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The result of the benchmark: best settings, cosine gate, and rounds in turns.

    ``texts`` replace the docstrings. ``only`` limits the peers to those whose names contain one of its words.
    """
    with contest.ground(model, quick=quick) as on:
        workloads = {"own texts": list(texts)} if texts else _workloads(on)
        sample = next(iter(workloads.values()))[: 30 if quick else contest.SAMPLE]
        with contest.enter(contest.select(on.peers(), only), on, sample, say) as field:
            measurements: list[Measurement] = []
            for group, chosen in workloads.items():
                measurements += _measure(group, chosen, on, field, rounds, say)
            say(LATENCY)
            measurements += _latency(field, rounds, on.device)
            measurements += _costs(field)
        settings = {
            "model": on.folder.name,
            "device": on.device,
            "threads": on.threads,
            "tokens": "those that the model sees: special tokens in, padding and what is cut off not",
            "flops": "2 x weights of the layers + 4 x layers x length x hidden per token, held against the GEMM rate "
            "of the contender's own precision, measured in the same rounds",
            "start": "from the start of a process to its first vector; files in the page cache, exported and compiled "
            "forms of the model made before",
            "sweep": f"{len(sample)} texts, a process per setting, a pass to warm up, the better of two",
        }
    return document("engine", measurements, settings=settings, extra=field.as_json())


def _workloads(on: Ground) -> dict[str, list[str]]:
    whole = docstrings(100 if on.quick else 2_000)
    per_word = float(on.token_counts(whole[:100]).sum()) / sum(len(text.split()) for text in whole[:100])
    return {DOCSTRINGS: whole} | {
        f"{size} texts": of_length(tokens, count // 20 if on.quick else count, tokens_per_word=per_word)
        for size, tokens, count in (("short", 10, 1_500), ("medium", 140, 250), ("long", 300, 150))
    }


def _measure(group: str, texts: Sequence[str], on: Ground, field: Field, rounds: int, say: Say) -> list[Measurement]:
    """Check every contender's vectors, then measure those that passed, and the machine's limit in the same rounds."""
    say(f"{group}: cosine gate")
    lengths = on.token_counts(texts)
    tokens = int(lengths.sum())
    path = on.file("texts", texts)
    for contender in field.alive():
        contender.running.ask("texts", name="texts", path=path)
    reference, _ = field[REFERENCE].vectors("texts", on.path)
    measurements = []
    for contender in field.contenders:
        details: dict[str, Any] = {"texts": len(texts), "tokens": tokens, "mean_tokens": round(tokens / len(texts), 1)}
        details["precision"] = contender.peer.precision
        try:
            vectors, details["first_pass_seconds"] = contender.vectors("texts", on.path)
            refused, cosines = gated(contender, vectors, reference)
            details |= cosines
        except PeerError as error:
            if contender.peer.ours:
                raise
            refused = f"it broke: {error}"
        measurements.append(Measurement(group, contender.peer.name, "tokens/s", [], refused=refused, details=details))
    racing = {
        measurement.name: (lambda name=measurement.name: field[name].embed("texts"))
        for measurement in measurements
        if not measurement.refused
    }
    limit = Limit(on, sorted({measurement.details["precision"] for measurement in measurements}))
    seconds = in_turns(
        racing, rounds, lambda now: say(f"{group}, {now}"),
        before=lambda name: limit.measure() if name == REFERENCE else None,
    )  # fmt: skip
    for measurement in measurements:
        measurement.rounds = [tokens / taken for taken in seconds.get(measurement.name, [])]
    add_ratios(measurements, REFERENCE, targets=_targets(on) if group == DOCSTRINGS else {})
    for half in (f"sentence-transformers {on.half}", "OpenVINO bf16"):
        add_ratios(measurements, half, only=OUR)
    for ceiling in limit.measurements(group, lengths):
        precision = ceiling.details["precision"]
        own = [measurement for measurement in measurements if measurement.details["precision"] == precision]
        promised = Target(0.75) if (on.device, precision, group) == ("cpu", on.half, DOCSTRINGS) else None
        add_ratios([*own, ceiling], ceiling.name, targets={f"{OUR} {precision}": promised} if promised else {})
        measurements.append(ceiling)
    return measurements


def gated(contender: Contender, vectors: NDArray[Any], reference: NDArray[Any]) -> tuple[str | None, dict[str, Any]]:
    """The reason why a contender's speed does not count, or None, and its cosines to the reference."""
    similarities = stats.cosines(vectors, reference)
    details = {"cosine_min": float(similarities.min()), "cosine_mean": float(similarities.mean())}
    return contender.peer.gate.refusal(**details), details


class Limit:
    """The rate of the machine's matrix products in each precision, measured once in each round."""

    def __init__(self, on: Ground, precisions: Sequence[str]) -> None:
        self._device = on.device
        self._config = read_json(on.folder.transformer / "config.json")
        known = flops.counts(self._config)
        self._rates: dict[str, list[float]] = {
            precision: [] for precision in precisions if known and flops.has(precision, on.device)
        }

    def measure(self) -> None:
        for precision, rates in self._rates.items():
            rates.append(flops.gemm_rate(self._config, precision, self._device))

    def measurements(self, group: str, lengths: NDArray[np.int64]) -> list[Measurement]:
        """Tokens/s that texts of these lengths would reach if they were nothing but products."""
        return [
            Measurement(
                group, f"{LIMIT}, {precision}", "tokens/s",
                [rate * int(lengths.sum()) / flops.text_flops(self._config, lengths) for rate in rates],
                details={"precision": precision, "limit": True, "flop_per_second": float(np.median(rates))},
            )
            for precision, rates in self._rates.items()
            if rates
        ]  # fmt: skip


def _targets(on: Ground) -> Mapping[str, Target]:
    """Promised ratios to the reference. For a GPU the promise is a ratio to sentence-transformers in fp16 instead."""
    return {f"{OUR} int8": Target(5)} if on.device == "cpu" else {}


def _latency(field: Field, rounds: int, device: str) -> list[Measurement]:
    names = [contender.peer.name for contender in field.alive()]
    taken = in_turns(
        {name: lambda name=name: float(field[name].running.ask("short", calls=CALLS)["ms"]) for name in names},  # type: ignore[misc]
        rounds, lambda now: None,
    )  # fmt: skip
    promised = {names[0]: Target(10, at_most=True)} if names[0].startswith(OUR) and device == "cpu" else {}
    return [Measurement(LATENCY, name, "ms", taken[name], target=promised.get(name)) for name in names]


def _costs(field: Field) -> list[Measurement]:
    """Each contender's time to start, and its peak memory after all that it did here."""
    measurements = [Measurement(START, contender.peer.name, "s", contender.starts) for contender in field.contenders]
    for contender in field.alive():
        peak = contender.running.ask("memory")["peak_kib"]
        if peak:
            measurements.append(Measurement(MEMORY, contender.peer.name, "MiB", [peak / 1024]))
    return measurements
