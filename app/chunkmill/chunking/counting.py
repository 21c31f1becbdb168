"""What measures a chunk: the tokenizer of a model, or the number of characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chunkmill.chunking.libraries import library
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.errors import InvalidInput
from chunkmill.models import tokenizer_of

if TYPE_CHECKING:
    from chunkmill.openai.plan.tokens import TokenCounter
    from chunkmill.settings import Settings


@dataclass(frozen=True, slots=True)
class TextMeasure:
    """``sizes`` gives the size of each text. ``tail`` gives the position in a text at which its last ``n`` tokens or
    characters begin."""

    sizes: Callable[[Sequence[str]], list[int]]
    tail: Callable[[str, int], int]


def characters() -> TextMeasure:
    return TextMeasure(lambda texts: [len(text) for text in texts], lambda text, n: max(0, len(text) - n))


def tokens_of(settings: Settings, model: str | None, size: int) -> TextMeasure:
    """Counts by the tokenizer of ``model``, or of ``EMBEDDING_MODEL``.

    Raises :class:`UnknownModel` if the tokenizer is not on this machine, and :class:`InvalidInput` if the model reads
    fewer than ``size`` tokens of a text.
    """
    # They take half a second to import, and the help of a command that can cut documents needs none of them.
    from chunkmill.openai.catalogue import model_for, resolve_space
    from chunkmill.openai.plan.tokens import of_provider_model

    name = settings.embedding_model if model is None else model
    spec = resolve_space(
        settings, name, on_long=OnLong.TRUNCATE, dimensions=None, precision=settings.embedding_precision
    )
    paid = model_for(settings, spec)
    if paid is not None and paid.same_as is None:
        tokenizer = of_provider_model(paid)
        counts, around, prompt = tokenizer.counts, tokenizer.overhead, ""
    else:
        library("tokenizers")
        counter = of_folder(settings, spec)
        tokenizer, counts, around, prompt = counter.tokenizer, counter.counts, counter.around, counter.prompt
    if size > (room := spec.max_tokens - around):
        raise InvalidInput(
            f"the size of a chunk is {size} tokens, and {name} reads at most {room} of a text"
            f"{' besides its prompt' if prompt else ''}: what is longer would be cut. Choose {room} or less."
        )

    def sizes(texts: Sequence[str]) -> list[int]:
        return [count - around for count in counts(texts)]

    def tail(text: str, n: int) -> int:
        ends = tokenizer.ends(text)
        return int(ends[-n - 1]) if len(ends) > n else 0

    return TextMeasure(sizes, tail)


@dataclass(frozen=True, slots=True)
class FolderCounter:
    """Counts tokens as the engine reads them of a model's folder."""

    tokenizer: TokenCounter
    prompt: str
    """What the engine puts before each text."""
    lowercase: bool
    """Whether texts become lower case first."""
    unused: int
    """Special tokens that the tokenizer adds and the model does not read, because it is static."""
    around: int
    """How many tokens the model reads of an empty text: the prompt and the special tokens."""

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the model would read of each text, if it read texts of any length."""
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        if self.lowercase:
            texts = [text.lower() for text in texts]
        return [count - self.unused for count in self.tokenizer.counts(texts)] if texts else []


def of_folder(settings: Settings, spec: SpaceSpec) -> FolderCounter:
    """Counts the documents of a space whose model is on this machine.

    Raises :class:`UnknownModel` if its tokenizer is not, and :class:`InvalidSetting` if it cannot be read.
    """
    from chunkmill.openai.plan.tokens import from_tokenizer_file

    stored = tokenizer_of(spec.model, pooling=settings.embedding_pooling, trust=settings.trust)
    tokenizer = from_tokenizer_file(stored.path)
    unused = tokenizer.overhead if stored.static else 0
    empty = FolderCounter(tokenizer, spec.document_prompt, stored.lowercase, unused, 0)
    (around,) = empty.counts([""])
    return replace(empty, around=around)
