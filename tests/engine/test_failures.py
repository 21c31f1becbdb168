"""Promise 7, second half: a bad text is named with its reason, and its neighbours still get vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkmill.domain.spaces import OnLong
from chunkmill.errors import DeviceUnavailable, EngineError, InvalidSetting, ModelLoadError, TokenizerMismatch
from chunkmill.models import resolve_model
from chunkmill_workers.engine import Engine, token_limit
from chunkmill_workers.engine.tokenizer import TextTokenizer

from .conftest import reference, sample
from .faulty import Load, has_word, run


def test_a_forward_that_raises_costs_one_text(load: Load, toy_engine: Callable[[str], Engine]) -> None:
    engine, faulty = load()
    texts = [*sample(20), "poison", "more", "text"]
    bad = texts.index("poison")
    faulty.raises = has_word(engine, "poison")

    vectors, failures = run(engine, texts)

    assert failures == {bad: ("forward_failed", "RuntimeError: the kernel did not like these shapes")}
    assert sorted(vectors) == [index for index in range(len(texts)) if index != bad]
    expected = toy_engine("bert-mean").embed(texts).vectors
    for index, vector in vectors.items():
        np.testing.assert_allclose(vector, expected[index], atol=1e-5)
    with pytest.raises(EngineError, match=rf"text {bad} of .*forward_failed"):
        engine.embed(texts)


def test_out_of_memory_on_one_text_is_that_texts_failure(load: Load) -> None:
    engine, faulty = load()
    faulty.raises = has_word(engine, "poison")
    faulty.error = torch.OutOfMemoryError("tried to allocate 1 TiB")

    vectors, failures = run(engine, ["poison", "fine"])

    assert list(vectors) == [1]
    assert failures[0][0] == "out_of_memory"
    assert "1 TiB" in failures[0][1]
    assert "5 tokens" in failures[0][1]
    assert engine.batch_tokens == 512, "one text that never fits says nothing about the others"


def test_a_pass_that_does_not_fit_is_halved_and_the_lesson_is_kept(
    load: Load, toy_engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine, faulty = load(learned=tmp_path)
    faulty.most_tokens = 200
    texts = sample(60)

    vectors, failures = run(engine, texts)

    assert not failures
    np.testing.assert_allclose(
        np.stack([vectors[at] for at in range(len(texts))]), toy_engine("bert-mean").embed(texts).vectors, atol=1e-5
    )
    assert engine.batch_tokens <= 256
    too_big = [tokens for tokens in faulty.passes if tokens > 200]
    assert len(too_big) <= 6, "the wall was run into again and again"
    # The next process on this machine starts below it, and another model does not.
    again, second = load(learned=tmp_path)
    second.most_tokens = 200
    run(again, texts)
    assert again.batch_tokens <= engine.batch_tokens
    assert len([tokens for tokens in second.passes if tokens > 200]) < len(too_big)
    assert load(learned=tmp_path / "elsewhere")[0].batch_tokens == 512


def test_a_shortage_that_is_over_leaves_the_passes_as_long_as_they_were(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_limit, "TRIAL_AFTER", 2)
    engine, faulty = load(learned=tmp_path)
    usual, faulty.most_tokens = faulty.most_tokens, 200
    run(engine, sample(60))
    assert engine.batch_tokens < 512

    faulty.most_tokens = usual
    for _ in range(4):
        run(engine, sample(60))

    assert engine.batch_tokens == 512
    assert load(learned=tmp_path)[0].batch_tokens == 512


def test_a_lesson_that_cannot_be_read_or_kept_costs_no_text(load: Load, tmp_path: Path) -> None:
    engine, faulty = load(learned=tmp_path)
    faulty.most_tokens = 200
    run(engine, sample(60))
    (file,) = tmp_path.iterdir()
    file.write_text("not JSON")

    again, _ = load(learned=tmp_path)
    blocked, faulty = load(learned=file / "below a file")
    faulty.most_tokens = 200

    assert again.batch_tokens == 512
    assert not run(blocked, sample(60))[1]


def test_a_broken_device_blames_no_text(load: Load) -> None:
    engine, faulty = load()
    faulty.raises = lambda _: True

    with pytest.raises(EngineError, match="no longer runs on cpu") as caught:
        list(engine.stream(sample(5)))
    assert caught.value.retryable


def test_a_failed_window_fails_its_text_once(load: Load) -> None:
    engine, faulty = load()
    faulty.raises = lambda row: len(row) > 20
    long = "word " * 200

    results = list(engine.stream(["short", long], on_long=OnLong.SPLIT))

    failures = [failure for result in results for failure in result.failures]
    assert [(failure.index, failure.code) for failure in failures] == [(1, "forward_failed")]
    assert [index for result in results for index in result.indices] == [0]


def test_a_vector_that_stays_infinite_is_a_failure(load: Load) -> None:
    engine, faulty = load()
    faulty.spoils = has_word(engine, "poison")
    engine._exact.backend = faulty  # fp32 does not help

    vectors, failures = run(engine, ["fine", "poison", "good"])

    assert sorted(vectors) == [0, 2]
    assert failures[1][0] == "not_finite"


def test_half_precision_gets_a_second_chance_in_fp32(load: Load, toy_engine: Callable[[str], Engine]) -> None:
    engine, faulty = load("bf16")
    faulty.spoils = has_word(engine, "poison")

    vectors, failures = run(engine, ["fine", "poison", "good"])

    assert not failures
    exact = toy_engine("bert-mean").embed(["fine", "poison", "good"]).vectors
    np.testing.assert_allclose(vectors[1], exact[1], atol=1e-5)
    assert np.abs(vectors[0] - exact[0]).max() > 1e-5, "bf16 was not used at all"


def test_a_score_out_of_range_is_computed_again(toy_path: Callable[[str], Path], tmp_path: Path) -> None:
    """The fast attention subtracts no maximum; what overflows in it must come out right all the same."""
    folder = copy(toy_path("bert-mean"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".query." in name or ".key." in name:
            tensors[name] *= 12  # scores of several hundred
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = sample(20)

    engine = Engine.load(str(folder), device="cpu", dtype="fp32")
    vectors = engine.embed(texts).vectors

    np.testing.assert_allclose(vectors, reference(folder).encode_document(texts), atol=1e-4)


def test_a_text_that_cannot_be_tokenized_fails_alone(toy_engine: Callable[[str], Engine]) -> None:
    texts = ["fine", "a lone surrogate \ud800 inside", "good", "\udfff"]

    vectors, failures = run(toy_engine("bert-mean"), texts)

    assert sorted(vectors) == [0, 2]
    assert {index: code for index, (code, _) in failures.items()} == {
        1: "tokenize_failed",
        3: "tokenize_failed",
    }
    assert all("surrogate \ud800" not in reason for _, reason in failures.values())


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy(toy_path("bert-mean"), tmp_path / "model")
    bundled = resolve_model("all-MiniLM-L6-v2").path
    shutil.copy(bundled / "tokenizer.json", folder / "tokenizer.json")

    with pytest.raises(TokenizerMismatch, match=r"30521 .*knows 500 tokens"):
        Engine.load(str(folder), device="cpu")


def test_a_tokenizer_with_far_fewer_tokens_is_refused(toy_path: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(resolve_model("all-MiniLM-L6-v2").path, tmp_path / "model")
    shutil.copy(toy_path("bert-mean") / "tokenizer.json", folder / "tokenizer.json")

    with pytest.raises(TokenizerMismatch, match=r"has 500 tokens and the model knows 30522"):
        Engine.load(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["xlm-roberta", "mpnet", "longformer"])
def test_another_pad_id_is_refused_if_the_model_counts_positions_from_it(
    kind: str, toy_path: Callable[[str], Path]
) -> None:
    tokenizer = TextTokenizer.load(toy_path("xlm-roberta-cls"))
    assert tokenizer.pad_id == 1

    with pytest.raises(TokenizerMismatch, match=r"pad_token_id is 1 and the model's config.json says 2"):
        tokenizer.check({"model_type": kind, "pad_token_id": 2}, rows=512)


@pytest.mark.parametrize("kind", ["bert", "albert", "distilbert", "electra", "modernbert", "nomic_bert", "qwen3"])
def test_another_pad_id_is_accepted_if_padding_reaches_no_vector(kind: str, toy_path: Callable[[str], Path]) -> None:
    TextTokenizer.load(toy_path("xlm-roberta-cls")).check({"model_type": kind, "pad_token_id": 2}, rows=512)


def test_a_padded_vocabulary_is_no_mismatch(toy_path: Callable[[str], Path]) -> None:
    folder = resolve_model(str(toy_path("bert-mean")))
    tokenizer = TextTokenizer.load(folder.transformer)

    tokenizer.check({"model_type": "bert", "pad_token_id": 1, "cls_token_id": 0}, rows=512)


def test_missing_weights_are_refused(toy_path: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(toy_path("bert-mean"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layer.1.output.dense.weight" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelLoadError, match=r"lack 1 tensors.*layer\.1\.output\.dense\.weight"):
        Engine.load(str(folder), device="cpu")


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"dtype": "int4"}, {"batch_tokens": 0}])
def test_words_that_do_not_exist_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidSetting):
        Engine.load("all-MiniLM-L6-v2", **options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="EMBEDDING_DEVICE=auto"):
        Engine.load("all-MiniLM-L6-v2", device="cuda")
