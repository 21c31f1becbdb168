"""Tokenizers that were made to harm: the Rust library would end the process, or take all memory for a word."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from chunkmill.errors import InvalidSetting, ModelLoadError
from chunkmill.models.locate import bundled_folder
from chunkmill.models.tokenizers import require_bounded
from chunkmill.openai.plan.tokens import from_tokenizer_file
from chunkmill_workers.engine.results import TextFailure
from chunkmill_workers.engine.tokenizer import TextTokenizer

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
PIECE = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def table(text: str) -> str:
    """SentencePiece's table with an empty trie."""
    return base64.b64encode((0).to_bytes(4, "little") + text.encode() + b"\0").decode()


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def template(single: list[Any], ids: int = 1) -> dict[str, Any]:
    special = {"id": "[CLS]", "ids": [101] * ids, "tokens": ["[CLS]"] * ids}
    return {"type": "TemplateProcessing", "single": single, "pair": [TEXT], "special_tokens": {"[CLS]": special}}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "replacements": ({"normalizer": sequence(*[REPLACE] * 5)}, "may make more than 64 characters of one"),
    "nested replacements": ({"normalizer": sequence(sequence(REPLACE), sequence(sequence(REPLACE)))}, "more than 64"),
    "one replacement": ({"normalizer": REPLACE | {"content": "a" * 10**6}}, "more than 64"),
    "an empty match": (
        {"normalizer": sequence(*[{"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "aa"}] * 5)},
        "more than 64",
    ),
    "a table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": table("a" * 10**6)}}, "more than 64"),
    "bytes of bytes": ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 20)}, "more than 64"),
    "many steps": ({"normalizer": sequence(*[{"type": "Lowercase"}] * 1_000)}, "1,000 normalisers"),
    "a long beginning": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "adds 1,000,004 tokens"),
    "a template of many": ({"post_processor": template([TEXT, *[PIECE] * 10**4])}, "adds 10,002 tokens"),
    "a token of many": ({"post_processor": template([PIECE, TEXT], 10**4)}, "adds 10,002 tokens"),
    "a repeated text": ({"post_processor": template([TEXT] * 10**4)}, "repeats the text"),
    "deep": ({"normalizer": "DEEP"}, "recursion limit|cannot be read"),
    "no tokenizer": ({"model": {"type": "Evil"}}, "cannot be read"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundled = bundled_folder()
    assert bundled is not None
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (bundled / file).is_file():
            shutil.copy(bundled / file, tmp_path / file)
    return tmp_path


def change(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "tokenizer.json"
    text = json.dumps(json.loads(file.read_text()) | changes)
    deep = '{"type":"Sequence","normalizers":[' * 10_000 + "]}" * 10_000
    file.write_text(text.replace('"DEEP"', deep))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_that_makes_much_of_little_is_refused(folder: Path, kind: str) -> None:
    changes, message = HOSTILE[kind]
    change(folder, changes)
    with pytest.raises(ModelLoadError, match=message):
        TextTokenizer.load(folder)
    with pytest.raises(InvalidSetting, match=message):
        from_tokenizer_file(folder / "tokenizer.json")


def test_padding_to_a_length_without_measure_is_left_out(folder: Path) -> None:
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 7,
               "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    change(folder, {"padding": padding})
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    loaded = TextTokenizer.load(folder)
    (ids,) = loaded.encode(["a"])
    assert not isinstance(ids, TextFailure)
    assert (len(ids), loaded.pad_id) == (3, 7)
    assert from_tokenizer_file(folder / "tokenizer.json").counts(["a"]) == [3]


def test_a_pattern_that_never_ends_fails_its_text_alone(folder: Path) -> None:
    splits = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(folder, {"pre_tokenizer": splits})
    evil = "a" * 60 + "b"
    _, failure = TextTokenizer.load(folder).encode(["plain", evil])
    assert isinstance(failure, TextFailure)
    counter = from_tokenizer_file(folder / "tokenizer.json")
    with pytest.raises(InvalidSetting, match="cannot read a text") as refused:
        counter.counts(["plain", evil])
    assert evil not in str(refused.value)
    with pytest.raises(InvalidSetting, match="cannot read a text"):
        counter.ends(evil)


def test_a_word_without_measure_is_refused(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder, {"model": model | {"max_input_chars_per_word": 10**9}})
    with pytest.raises(ModelLoadError, match="max_input_chars_per_word"):
        TextTokenizer.load(folder)


def test_a_file_outside_is_no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "vocab_file": "/etc/passwd"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelLoadError, match=r"names a file \(vocab_file\)"):
        TextTokenizer.load(folder)


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        sequence({"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
        sequence(
            {"type": "Precompiled", "precompiled_charsmap": table("\u0635" * 18)},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
        ),
        sequence(
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ),
        sequence(*[{"type": "Replace", "pattern": {"Regex": r"[^a-z]+"}, "content": " "}] * 20),
    ],
)  # fmt: skip
def test_usual_tokenizers_are_bounded(folder: Path, normalizer: dict[str, Any] | None) -> None:
    change(folder, {"normalizer": normalizer})
    require_bounded(Tokenizer.from_file(str(folder / "tokenizer.json")))


def test_the_bundled_and_the_small_models_are_bounded(toy_path: Callable[[str], Path], folder: Path) -> None:
    for file in (folder / "tokenizer.json", toy_path("bert-mean") / "tokenizer.json"):
        require_bounded(Tokenizer.from_file(str(file)))
