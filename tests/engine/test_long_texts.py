"""A long text gets the ids, and the mark, that it would get if it were tokenized whole."""

from __future__ import annotations

import base64
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from chunkmill.domain.spaces import OnLong
from chunkmill_workers.engine import Engine, long_texts, overlaps
from chunkmill_workers.engine import tokenizer as tokenizer_module
from chunkmill_workers.engine.overlaps import Overlaps
from chunkmill_workers.engine.results import TextFailure
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.engine.windows import truncate

from .conftest import stdlib_docstrings

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]


def _train(tokenizer: Any, trainer: Any) -> Any:
    trainer.show_progress = False
    repeats = ["漢字かな 漢字 aa aaa aaaa aaaaaaaa " * 30]  # tokens that lie across every place of a text
    tokenizer.train_from_iterator([*stdlib_docstrings()[:150], "😀 a a", *repeats], trainer)
    return tokenizer


def _bert(**options: Any) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _train(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIALS))


def _unigram(before: Any, normalizer: Any = None) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer or normalizers.NFKC()
    if before is not None:
        tokenizer.pre_tokenizer = before
    return _train(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIALS, unk_token="<unk>"),
    )


def _byte_bpe(before: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet))


def _spaceless_bpe(normalizer: Any) -> Any:
    """As Gemma's: spaces are letters of the alphabet, and the whole text is one word."""
    words = pre_tokenizers.Split("▁", "merged_with_next")  # only while training, so that no token crosses a space
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    trained = _train(tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS))
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return trained


_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PHRASES = pre_tokenizers.Split(Regex(r"\S+ \S+ "), "isolated")
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: _bert(lowercase=True),
    "bert-cased": lambda: _bert(lowercase=False),
    "xlm-roberta": lambda: _unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
    ),
    "t5": lambda: _unigram(pre_tokenizers.Metaspace()),
    "unigram-without-words": lambda: _unigram(None),
    "gpt2": lambda: _byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix-space": lambda: _byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt4": lambda: _byte_bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_GPT4), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "gemma": lambda: _spaceless_bpe(normalizers.Replace(" ", "▁")),
    "llama": lambda: _spaceless_bpe(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "phrases": lambda: _byte_bpe(
        pre_tokenizers.Sequence([_PHRASES, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
}


@cache
def built(name: str) -> TextTokenizer:
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return TextTokenizer(tokenizer, pad_id=None)


def check(name: str, text: str, limits: tuple[int, ...] = (8, 48)) -> None:
    tokenizer = built(name)
    [whole] = tokenizer._encode([text], 0)
    [exact] = tokenizer.encode([text])
    assert np.array_equal(exact, whole) if not isinstance(whole, TextFailure) else exact == whole
    for limit in limits:
        [ids] = tokenizer.encode([text], limit=limit)
        if isinstance(ids, TextFailure) or isinstance(whole, TextFailure):
            assert ids == whole
            continue
        frame = tokenizer.frame("")
        assert (len(ids) > limit) is (len(whole) > limit)
        if len(whole) > limit:
            assert truncate(ids, limit, frame).tolist() == truncate(whole, limit, frame).tolist()
        else:
            assert ids.tolist() == whole.tolist()


@pytest.fixture(autouse=True)
def _texts_are_long_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 2_000)
    monkeypatch.setattr(long_texts, "_PIECE", 3_000)
    monkeypatch.setattr(overlaps, "_WINDOW", 3_000)
    # A window is read again for each end that it might have, from a margin before it: a third of a window is too much.
    monkeypatch.setattr(overlaps, "_MARGIN", 256)


# The regular expression takes time that is quadratic in a text without spaces.
WITHOUT_PHRASES = [name for name in TOKENIZERS if name != "phrases"]
PROSE = " ".join(stdlib_docstrings()[:40])
RANDOM = random.Random(7)
NOISE = "".join(
    chr(RANDOM.choice((RANDOM.randrange(32, 0x250), RANDOM.randrange(0x300, 0xD7FF)))) for _ in range(9_000)
)
ODD = {
    "prose": PROSE[:30_000],
    "single letters": "a b c " * 4_000,
    "one letter": "a " * 9_000,
    "one word": "a" * 20_003,
    "one word, then more": "a" * 20_001 + " b c d" * 3_000,
    "a word that ends late": "x" * 97 + " " + "y" * 4_080 + " z" * 9_000,
    "base64": base64.b64encode(RANDOM.randbytes(12_000)).decode(),
    "white space": " " * 20_000,
    "line ends": "\r\n\t " * 5_000,
    "white space, then a word": " " * 20_000 + "word " * 100,
    "white space before a token that swallows it": "x" + " " * 20_000 + "<mask>" + " end" * 20,
    "emoji": "😀" * 9_000,
    "joined emoji": "👩\u200d👩\u200d👧\u200d👦" * 2_000,
    "CJK": "漢字かな交じり文" * 2_000,
    "accents": "e" + "\u0301\u0323" * 9_000 + " end",
    "invisible": "\u200b" * 20_000,
    "invisible inside a word": "ab" * 30 + "\u200b" * 9_000 + "cd" * 40 + " end" * 500,
    "control": "\x00\x01" * 9_000,
    "digits": "1234567890" * 2_000,
    "ligatures": "ﬁﬃ㎡ﷺ" * 4_000,
    "punctuation": "=-" * 9_000,
    "special tokens": "</s> <mask><s> literal " * 900,
    "noise": NOISE,
    "CJK in lines": "漢字かな交じり文、" * 60 + "\n" + "漢字かな" * 100 + "\u3000" + "漢字かな交じり文。" * 900,
    "Thai": "ภาษาไทยไม่มีช่องว่าง" * 900,
}


# The others are of the same kinds of models and differ in what stands before them.
ONE_OF_EACH_KIND = ("bert", "t5", "gpt2", "llama")


def one_of_each_kind(names: Iterable[str]) -> list[Any]:
    """The names, those of the other models of a kind marked as slow."""
    return [pytest.param(name, marks=() if name in ONE_OF_EACH_KIND else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", one_of_each_kind(WITHOUT_PHRASES))
@pytest.mark.parametrize("text", ODD)
def test_an_odd_long_text_gets_the_ids_that_it_gets_whole(name: str, text: str) -> None:
    check(name, ODD[text])


_PARTS = st.sampled_from(
    [
        "a",
        "ab ",
        "aa",
        " ",
        "\n",
        "the word ",
        "Übergrößenträger",
        "漢",
        "😀",
        "\u0301",
        "\u200b",
        "1",
        "'s",
        ".",
        "-- ",
        "é",
        *("</s>", "<mask>", "\t", "ß", "İ", "\u3000", "x y z ", "ﬁ"),
    ]
)
_TEXTS = st.lists(st.tuples(_PARTS, st.integers(1, 1_500)), min_size=1, max_size=12)


@pytest.mark.parametrize("name", WITHOUT_PHRASES)
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=_TEXTS, limit=st.integers(4, 300))
@example(parts=[("a", 1_500)] * 5, limit=20)
def test_a_long_text_of_odd_parts_gets_the_ids_that_it_gets_whole(
    name: str, parts: list[tuple[str, int]], limit: int
) -> None:
    check(name, "".join(part * times for part, times in parts), (limit,))


def test_a_tokenizer_that_takes_words_together_is_not_cut_between_them() -> None:
    check("phrases", ODD["prose"])


def test_a_word_that_becomes_unknown_behind_the_place_of_the_cut_is_unknown() -> None:
    before = "a\n" * 45 + "\n" * (4_096 - 90 - 40)  # a beginning of 4,096 characters ends 40 characters into the word

    check("bert", before + "zq" * 60 + "\nb" * 3_000)


def test_a_long_text_is_not_read_to_its_end_if_its_beginning_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WITHOUT_PHRASES:
        tokenizer = built(name)
        read: list[int] = []
        own = tokenizer._bodies
        monkeypatch.setattr(
            tokenizer, "_bodies", lambda texts, own=own, read=read: (read.extend(map(len, texts)), own(texts))[1]
        )
        for text in (PROSE * 20, "a b c " * 100_000, "漢字かな" * 100_000):
            tokenizer.encode([text], limit=48)
        assert max(read) < 100_000, name


def test_a_word_is_not_cut_where_its_end_decides() -> None:
    # The last two letters merge first, then the two before them: pairs are counted from the end, however far it is.
    letters = [chr(0x4E00 + at) for at in range(9_001)]
    merges = [(left, right) for left, right in reversed(list(itertools.pairwise(letters)))]
    tokens = ["a", *letters, *(left + right for left, right in merges)]
    model = models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges)
    tokenizer = TextTokenizer(Tokenizer(model), pad_id=None)

    for length in (9_000, 9_001):
        text = "".join(letters[:length])
        [ids] = tokenizer.encode([text])
        assert ids.tolist() == tokenizer._encode([text], 0)[0].tolist()
        assert len(ids) == 4_500 + length % 2


# A Unigram model's best path through a word depends on all of it, also through one of a million characters.
UNIGRAM = {"xlm-roberta", "t5", "unigram-without-words"}
WHOLE = {(name, kind) for name in UNIGRAM for kind in ("one word", "base64", "CJK", "emoji", "Thai")}
WHOLE |= {(name, "CJK lines") for name in ("t5", "unigram-without-words")}  # their words do not end with a line


@pytest.mark.parametrize("name", one_of_each_kind(WITHOUT_PHRASES))
@pytest.mark.parametrize("kind", ["one word", "base64", "CJK", "CJK lines", "emoji", "Thai"])
def test_a_long_text_without_spaces_is_read_in_windows(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = built(name)
    read: list[int] = []
    own = Overlaps._read

    def counted(self: Overlaps, text: str, start: int, length: int) -> Any:
        read.append(min(length, len(text) - start))
        return own(self, text, start, length)

    monkeypatch.setattr(Overlaps, "_read", counted)
    text = "漢字かな交じり文、漢字\n" * 4_000 if kind == "CJK lines" else (ODD[kind] * 20)[:40_000]
    [ids] = tokenizer.encode([text])

    assert ids.tolist() == tokenizer._encode([text], 0)[0].tolist()
    assert (max(read, default=0) > overlaps._WINDOW) is ((name, kind) in WHOLE)


@pytest.mark.parametrize("name", one_of_each_kind([*sorted(UNIGRAM), "bert-cased", "gpt2"]))
@pytest.mark.parametrize("kind", ODD)
def test_a_text_too_long_to_be_read_whole_is_cut_and_nothing_of_it_is_lost(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlaps, "_WORTH_A_CUT", 12_000)
    read: list[int] = []
    own = Overlaps._read

    def counted(self: Overlaps, text: str, start: int, length: int) -> Any:
        read.append(min(length, len(text) - start))
        return own(self, text, start, length)

    monkeypatch.setattr(Overlaps, "_read", counted)
    text = (ODD[kind] * 20)[:20_000]  # one cut
    tokenizer = built(name)
    [ids] = tokenizer.encode([text])
    [whole] = tokenizer._encode([text], 0)

    assert max(read, default=0) <= 12_000
    if name not in UNIGRAM:
        assert np.array_equal(ids, whole) if not isinstance(whole, TextFailure) else ids == whole
        return
    others = (Counter(ids.tolist()) - Counter(whole.tolist())) + (Counter(whole.tolist()) - Counter(ids.tolist()))
    assert others.total() <= 8  # in the same letter again and again, one more or less shifts all that follow
    if len(set(text[100:200])) > 1:
        assert _same_beginning(ids, whole) + _same_beginning(ids[::-1], whole[::-1]) >= len(whole) - 3


def _same_beginning(ids: Any, others: Any) -> int:
    return next((at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), len(ids))


def test_a_giant_word_of_a_bert_tokenizer_is_not_read_whole(minilm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = minilm._tokenizer
    read: list[int] = []
    own = tokenizer._bodies
    monkeypatch.setattr(tokenizer, "_bodies", lambda texts: (read.extend(map(len, texts)), own(texts))[1])

    [ids] = tokenizer.encode(["a" * 3_000_000 + " word"])

    assert ids.tolist() == tokenizer._encode(["a" * 200 + " word"], 0)[0].tolist()
    assert max(read) < 10_000


@pytest.mark.parametrize("policy", OnLong)
def test_a_long_text_gets_the_vector_that_it_gets_whole(
    policy: OnLong, toy_engine: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = toy_engine("xlm-roberta-cls")
    texts = ["short", PROSE[:12_000], "word " * 3_000]
    cut_up, failed = _all(engine, texts, policy)

    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 10**9)
    whole, failed_whole = _all(engine, texts, policy)

    assert failed == failed_whole == ([1, 2] if policy is OnLong.REJECT else [])
    assert cut_up.keys() == whole.keys()
    for index, vector in cut_up.items():
        np.testing.assert_allclose(vector, whole[index], atol=1e-6, rtol=0)


def _all(engine: Engine, texts: list[str], policy: OnLong) -> tuple[dict[int, Any], list[int]]:
    vectors: dict[int, Any] = {}
    failed: list[int] = []
    for result in engine.stream(texts, on_long=policy):
        vectors |= dict(zip(result.indices.tolist(), result.vectors, strict=True))
        failed += [failure.index for failure in result.failures]
    return vectors, sorted(failed)


def test_a_text_cut_on_the_left_is_read_whole(toy_path: Callable[[str], Path]) -> None:
    loaded = TextTokenizer.load(toy_path("bert-mean"))
    left = TextTokenizer(loaded._tokenizer, pad_id=None, cut_left=True)

    [ids] = left.encode([PROSE], limit=8)

    assert ids.tolist() == loaded._encode([PROSE], 0)[0].tolist()
