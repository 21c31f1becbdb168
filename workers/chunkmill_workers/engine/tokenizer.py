"""From texts to token ids, with the Rust tokenizer of Hugging Face alone.

Padding and truncation are off, because the engine needs the true number of tokens of every text, and pads each
TokenBatch to its own longest row. Several threads may call it; the Rust side releases the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers, processors

from chunkmill.errors import ChunkmillError, ModelLoadError, TokenizerMismatch
from chunkmill.models.files import MOST_FILE_BYTES, read_json
from chunkmill.models.tokenizers import load_tokenizer, raise_unless_panic, require_bounded
from chunkmill.models.transformer import POSITIONS_FROM_PAD
from chunkmill.system.files import read_at_most
from chunkmill_workers.engine import long_texts
from chunkmill_workers.engine.long_texts import LONG_TEXT
from chunkmill_workers.engine.overlaps import Overlaps
from chunkmill_workers.engine.results import TextFailure
from chunkmill_workers.engine.windows import Frame, Ids

# How many rows of an embedding table may have no token. Tables are padded to round numbers (Qwen3 by 267 rows, Qwen2
# 290, DeBERTa 99, Nomic 6), while the cased and the uncased BERT differ by 1,526.
_UNUSED_ROWS = 1_024


class TextTokenizer:
    """The tokenizer of one model folder."""

    def __init__(self, tokenizer: Any, *, pad_id: int | None, cut_left: bool = False) -> None:
        self._tokenizer = tokenizer
        self.pad_id = pad_id
        self._cut_left = cut_left
        self._one_long_text = threading.Lock()
        probe = tokenizer.encode("a")
        if any(probe.type_ids):
            raise ModelLoadError(
                "the tokenizer gives a single text segment ids other than 0, which Chunkmill does not support: "
                "choose another model"
            )
        mask = np.array(probe.special_tokens_mask, np.bool_)
        ids = np.array(probe.ids, np.int32)
        own = np.flatnonzero(~mask)
        first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (len(ids), len(ids))
        self._prefix, self._suffix = ids[:first], ids[last:]
        self.probe = ids
        """(length,) int32: the ids of a text that every model with this tokenizer can read."""
        self.max_id = max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def load(cls, folder: Path, *, lowercase: bool = False) -> TextTokenizer:
        """The tokenizer of tokenizer.json, or if there is none, the one that transformers makes of the other files.

        ``lowercase`` turns texts into lower case first. Raises ModelLoadError.
        """
        try:
            return cls._load(folder, lowercase=lowercase)
        except ChunkmillError:
            raise
        except BaseException as error:
            raise_unless_panic(error)
            raise ModelLoadError(
                f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {str(error)[:500]}): save it once "
                "with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            ) from error

    @classmethod
    def load_static(cls, folder: Path) -> TextTokenizer:
        """The tokenizer of a StaticEmbedding module: tokenizer.json as it is, without special tokens.

        Raises ModelLoadError.
        """
        file = folder / "tokenizer.json"
        try:
            tokenizer = load_tokenizer(Tokenizer, read_at_most(file, MOST_FILE_BYTES))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{file} cannot be read ({str(error)[:500]}): copy the model folder again") from error
        cut_left = (tokenizer.truncation or {}).get("direction") == "left"
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.post_processor = None  # it adds the special tokens, which the table has no use for
        return cls(tokenizer, pad_id=None, cut_left=cut_left)

    @classmethod
    def _load(cls, folder: Path, *, lowercase: bool) -> TextTokenizer:
        file = folder / "tokenizer.json"
        if file.is_file():
            tokenizer = load_tokenizer(Tokenizer, read_at_most(file, MOST_FILE_BYTES))
        else:
            tokenizer = _convert(folder)
            require_bounded(tokenizer)
        padding = tokenizer.padding or {}
        tokenizer.no_padding()  # the default model's tokenizer.json pads and truncates to 128
        tokenizer.no_truncation()
        settings = _optional(folder / "tokenizer_config.json")
        names = _optional(folder / "special_tokens_map.json") | {k: v for k, v in settings.items() if v is not None}
        _follow(tokenizer, folder, settings, names)
        if lowercase:
            # As in sentence-transformers: first lower case, then the tokenizer's own normaliser.
            own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        pad = _content(names.get("pad_token"))
        pad_id = tokenizer.token_to_id(pad) if pad else padding.get("pad_id")
        return cls(tokenizer, pad_id=pad_id, cut_left=settings.get("truncation_side") == "left")

    def encode(
        self, texts: Sequence[str], prompt: str = "", *, first: int = 0, limit: int | None = None
    ) -> list[Ids | TextFailure]:
        """For each text its ids, (length,) int32 with special tokens and prompt, or the reason why it has none.

        A text that the tokenizer cannot read, such as one with a lone surrogate, fails alone. ``first`` is the index of
        ``texts[0]``, for the failures.

        With a ``limit``, a text of more than LONG_TEXT characters and more than ``limit`` tokens may get only
        ``limit + 1`` ids: the first ones of the text and the special tokens, which is what `cut` needs.
        """
        long = [at for at, text in enumerate(texts) if len(prompt) + len(text) > LONG_TEXT]
        if not long:
            return self._encode([prompt + text for text in texts], first)
        short = [at for at in range(len(texts)) if len(prompt) + len(texts[at]) <= LONG_TEXT]
        encoded = dict(zip(short, self._encode([prompt + texts[at] for at in short], first), strict=True))
        for at in long:
            encoded[at] = self._encode_long(prompt + texts[at], first + at, limit)
        return [
            replace(ids, index=first + at) if isinstance(ids, TextFailure) else ids
            for at, ids in sorted(encoded.items())
        ]

    def _encode(self, texts: Sequence[str], first: int) -> list[Ids | TextFailure]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts)
        except BaseException as error:  # noqa: BLE001 - a panic is one
            raise_unless_panic(error)
            if len(texts) == 1:
                return [TextFailure(first, "tokenize_failed", _reason(error))]
        else:
            return [
                np.array(encoding.ids, np.int32) if len(encoding) else _no_token(first + at)
                for at, encoding in enumerate(encodings)
            ]
        half = len(texts) // 2
        return [*self._encode(texts[:half], first), *self._encode(texts[half:], first + half)]

    def _encode_long(self, text: str, at: int, limit: int | None) -> Ids | TextFailure:
        """The ids of one long text, see `encode`. One at a time, so that the memory is that of one text."""
        with self._one_long_text:
            try:
                if limit is not None and not self._cut_left:
                    count = limit + 1 - len(self._prefix) - len(self._suffix)
                    body = long_texts.first_ids(
                        text, count, self._bodies, at_spaces=self._at_spaces, window=self._window
                    )
                    if body is not None:
                        return self._framed(np.array(body, np.int32))
                text = long_texts.squeeze(text, self._tokenizer, self._bodies)
                pieces = long_texts.pieces(text, at_spaces=self._at_spaces)
                ids = self._framed(long_texts.joined(pieces, self._bodies, self._overlaps))
            except BaseException as error:  # noqa: BLE001 - a panic is one
                raise_unless_panic(error)
                return TextFailure(at, "tokenize_failed", _reason(error))
            finally:
                long_texts.give_back_memory()
        return ids if len(ids) else _no_token(at)

    def _bodies(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _framed(self, body: Ids) -> Ids:
        return np.concatenate((self._prefix, body, self._suffix))

    @cached_property
    def _at_spaces(self) -> bool:
        return long_texts.splits_at_spaces(self._tokenizer, self._bodies)

    @cached_property
    def _overlaps(self) -> Overlaps:
        return Overlaps(self._tokenizer, self._window)

    @cached_property
    def _window(self) -> int:
        return long_texts.window_size(self._tokenizer)

    def frame(self, prompt: str) -> Frame:
        """The special tokens and the prompt of every row.

        The prompt's tokens are counted as in ``_get_prompt_length`` of sentence-transformers: the prompt is tokenized
        alone, and a special token at its end does not count.
        """
        length = 0
        if prompt:
            ids = self._tokenizer.encode(prompt).ids
            added = self._tokenizer.get_added_tokens_decoder()
            ends_special = bool(ids) and ids[-1] in added and added[ids[-1]].special
            length = len(ids) - len(self._prefix) - (1 if ends_special else 0)
        return Frame(self._prefix, self._suffix, max(length, 0), self._cut_left)

    def check(self, config: Mapping[str, Any], rows: int) -> None:
        """Raise TokenizerMismatch unless this tokenizer can belong to a model with this config.json.

        ``rows`` is the number of rows of the model's token embedding.
        """
        if self.max_id >= rows:
            raise _mismatch(f"its largest token id is {self.max_id} and the model knows {rows} tokens")
        if rows - self.max_id - 1 > _UNUSED_ROWS:
            raise _mismatch(f"it has {self.max_id + 1} tokens and the model knows {rows}")
        # In all other models the attention mask hides padding, and no vector depends on its id: multilingual-e5-small
        # states BERT's pad id beside the tokenizer of XLM-RoBERTa, and is right.
        counts = config.get("model_type") in POSITIONS_FROM_PAD
        expected = [
            ("pad_token_id", self.pad_id if counts else None),
            ("cls_token_id", int(self._prefix[0]) if len(self._prefix) else None),
            ("sep_token_id", int(self._suffix[-1]) if len(self._suffix) else None),
        ]
        for key, own in expected:
            stated = config.get(key)
            # An id beyond the vocabulary says nothing: it is the architecture's default, which nobody changed.
            if own is not None and stated is not None and stated < rows and stated != own:
                raise _mismatch(f"its {key} is {own} and the model's config.json says {stated}")


def _convert(folder: Path) -> Any:
    from transformers import AutoTokenizer

    for key, value in _optional(folder / "tokenizer_config.json").items():
        # transformers reads the file that such a key names, wherever it is.
        if key.endswith("_file") and value is not None:
            raise ModelLoadError(f"tokenizer_config.json in {folder} names a file ({key}): remove that key")
    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return loaded.backend_tokenizer


# The classes of transformers that make BERT's normaliser, and tokenizer_config.json's words for its options. What that
# file states holds over tokenizer.json, as in transformers.
_BERT_CLASSES = frozenset({None, "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MPNetTokenizer"})
_BERT_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def _follow(tokenizer: Any, folder: Path, settings: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Change ``tokenizer`` as tokenizer_config.json says. ``names`` are the folder's special tokens by their roles.

    Raises ModelLoadError for a special token that is asked for and does not exist.
    """
    normalizer = tokenizer.normalizer
    kind = settings.get("tokenizer_class")
    if isinstance(normalizer, normalizers.BertNormalizer) and (kind and kind.removesuffix("Fast")) in _BERT_CLASSES:
        for word, option in _BERT_OPTIONS.items():
            if settings.get(word) is not None:
                setattr(normalizer, option, settings[word])
        tokenizer.normalizer = normalizer
    probe = tokenizer.encode("a")
    own = [at for at, special in enumerate(probe.special_tokens_mask) if not special]
    before, after = (probe.tokens[: own[0]], probe.tokens[own[-1] + 1 :]) if own else ([], [])
    bos, eos = _content(names.get("bos_token")), _content(names.get("eos_token"))
    for word, token, there in (("add_bos_token", bos, before[:1]), ("add_eos_token", eos, after[-1:])):
        if settings.get(word) is True and (token is None or tokenizer.token_to_id(token) is None):
            raise ModelLoadError(
                f"{folder / 'tokenizer_config.json'} says {word}, but the tokenizer has no such token: copy the folder "
                "again, or remove the setting if the model was trained without it"
            )
        if settings.get(word) is not True or there == [token]:
            continue
        # Models such as e5-mistral take their vector from the end token, and tokenizer.json's template has none.
        before, after = ([token, *before], after) if word == "add_bos_token" else (before, [*after, token])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in dict.fromkeys([*before, *after])],
        )


def _content(token: Any) -> Any:
    """The text of a special token, which is stated as it is or as an object; None if there is none."""
    return token.get("content") if isinstance(token, dict) else token


def _optional(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    return settings


def _no_token(at: int) -> TextFailure:
    return TextFailure(at, "tokenize_failed", "the tokenizer finds no token in the text")


def _reason(error: BaseException) -> str:
    # Without the error's message: it may quote the text, as that of a UnicodeEncodeError does.
    return f"the tokenizer cannot read the text ({type(error).__name__})"


def _mismatch(problem: str) -> TokenizerMismatch:
    return TokenizerMismatch(
        f"the tokenizer was not made for this model: {problem}. Copy both from the same model again"
    )
