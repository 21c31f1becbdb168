"""What tokenizer_config.json says about the tokens holds, as it does in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkmill.errors import ModelLoadError
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.tokenizer import TextTokenizer

from .conftest import reference, sample


def folder_with(source: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"do_lower_case": True},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
    ],
)
def test_a_bert_tokenizer_normalises_as_its_settings_say(
    settings: dict[str, bool], toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_with(toy_path("bert-mean"), tmp_path / "model", tokenizer_class="BertTokenizer", **settings)
    texts = ["Some UPPER case Words", "na\u00efve caf\u00e9", "\u6f22\u5b57\u304b\u306a", *sample(5)]

    vectors = Engine.load(str(folder), device="cpu", dtype="fp32").embed(texts).vectors

    np.testing.assert_allclose(vectors, reference(folder).encode_document(texts), atol=1e-5, rtol=0)


def test_the_tokens_that_a_folder_adds_are_added_if_the_template_has_none(
    toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    source = folder_with(toy_path("qwen3-last"), tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None  # as in e5-mistral's folder
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    end = TextTokenizer.load(toy_path("qwen3-last"))._suffix.tolist()

    without = TextTokenizer.load(source)
    both = TextTokenizer.load(folder_with(source, tmp_path / "eos", add_eos_token=True, add_bos_token=False))

    assert without._suffix.tolist() == []
    assert both._suffix.tolist() == end
    [plain], [ended] = without.encode(["a text"]), both.encode(["a text"])
    assert ended.tolist() == [*plain.tolist(), *end]
    kept = TextTokenizer.load(folder_with(toy_path("qwen3-last"), tmp_path / "kept", add_eos_token=True))
    assert kept.encode(["a text"])[0].tolist() == ended.tolist()
    begun = TextTokenizer.load(
        folder_with(toy_path("qwen3-last"), tmp_path / "bos", add_bos_token=True, bos_token="<|endoftext|>")
    )
    assert begun.encode(["a text"])[0].tolist() == [*end, *ended.tolist()]


def test_a_token_that_is_to_be_added_and_does_not_exist_is_refused(
    toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_with(toy_path("qwen3-last"), tmp_path / "model", add_bos_token=True, bos_token=None)

    with pytest.raises(ModelLoadError, match="add_bos_token"):
        TextTokenizer.load(folder)
