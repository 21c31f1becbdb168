"""What measures a chunk: the tokenizer of a model, or the number of characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chunkmill.chunking.libraries import library
from chunkmill.domain.providers import CL100K
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.errors import InvalidInput
from chunkmill.models import tokenizer_of
from chunkmill.openai.catalogue import model_for, resolve_space
from chunkmill.openai.plan.tokens import TokenCounter, cl100k, from_tokenizer_file
from chunkmill.settings import Settings


@dataclass(frozen=True, slots=True)
class Measure:
    """``sizes`` gives the size of each text. ``tail`` gives the position in a text at which its last ``n`` tokens or
    characters begin."""

    sizes: Callable[[Sequence[str]], list[int]]
    tail: Callable[[str, int], int]


def characters() -> Measure:
    return Measure(lambda texts: [len(text) for text in texts], lambda text, n: max(0, len(text) - n))


def tokens_of(settings: Settings, model: str | None, size: int) -> Measure:
    """Counts by the tokenizer of ``model``, or of ``EMBEDDING_MODEL``.

    Raises :class:`UnknownModel` if the tokenizer is not on this machine, and :class:`InvalidInput` if the model reads
    fewer than ``size`` tokens of a text.
    """
    name = settings.embedding_model if model is None else model
    spec = resolve_space(
        settings, name, on_long=OnLong.TRUNCATE, dimensions=None, precision=settings.embedding_precision
    )
    counter, prompt, lowercase = _counter(settings, spec)
    (around,) = counter.counts([prompt])
    if size > (room := spec.max_tokens - around):
        raise InvalidInput(
            f"the size of a chunk is {size} tokens, and {name} reads at most {room} of a text"
            f"{' besides its prompt' if prompt else ''}: what is longer would be cut. Choose {room} or less."
        )

    def sizes(texts: Sequence[str]) -> list[int]:
        if prompt:
            texts = [prompt + text for text in texts]
        if lowercase:
            texts = [text.lower() for text in texts]
        return [count - around for count in counter.counts(texts)] if texts else []

    def tail(text: str, n: int) -> int:
        ends = counter.ends(text)
        return int(ends[-n - 1]) if len(ends) > n else 0

    return Measure(sizes, tail)


def _counter(settings: Settings, spec: SpaceSpec) -> tuple[TokenCounter, str, bool]:
    """The tokenizer of a space, the prompt before each text, and whether texts become lower case before it."""
    paid = model_for(settings, spec)
    if paid is not None and paid.same_as is None:
        counter = cl100k() if paid.tokenizer == CL100K else from_tokenizer_file(paid.tokenizer)
        return counter, "", False
    library("tokenizers")
    tokenizer = tokenizer_of(spec.model, pooling=settings.embedding_pooling, trust=settings.trust)
    return from_tokenizer_file(tokenizer.path), spec.document_prompt, tokenizer.lowercase
