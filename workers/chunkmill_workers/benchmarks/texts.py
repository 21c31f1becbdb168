"""The texts of the benchmarks: docstrings of Python's standard library, whole, or cut and joined to a length."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache

from chunkmill import Chunk
from chunkmill.cli.start.corpus import stdlib_docstrings

SEED = 20_240


@cache
def corpus() -> tuple[Chunk, ...]:
    """Every distinct docstring, in a shuffled order that is the same in every run."""
    distinct = list({chunk.text: chunk for chunk in stdlib_docstrings()}.values())
    random.Random(SEED).shuffle(distinct)
    return tuple(distinct)


def docstrings(count: int) -> list[str]:
    """A sample of at most ``count`` docstrings, all different."""
    return [chunk.text for chunk in corpus()[:count]]


def of_length(tokens: int, count: int, *, tokens_per_word: float) -> list[str]:
    """``count`` texts of about ``tokens`` tokens, give or take a quarter: consecutive words of the joined corpus."""
    rng = random.Random(SEED + tokens)
    words = itertools.cycle(word for chunk in corpus() for word in chunk.text.split())
    mean = tokens / tokens_per_word
    return [
        " ".join(itertools.islice(words, max(1, round(rng.uniform(0.75 * mean, 1.25 * mean))))) for _ in range(count)
    ]


def unique_chunks(originals: Sequence[Chunk], count: int, *, first: int = 0) -> Iterator[Chunk]:
    """``count`` chunks made of ``originals``. A counter before each text makes all texts different."""
    for number in range(first, first + count):
        original = originals[number % len(originals)]
        yield Chunk(f"{number}:{original.id}", f"{number} {original.text}", original.metadata)
