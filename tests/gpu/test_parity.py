"""Promise 6 on a GPU: every family, every number format, every length where kernels go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkmill.domain.spaces import OnLong
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.encoder.architectures import Build
from chunkmill_workers.engine.encoder.attention import torch_varlen
from tests.engine.conftest import FAMILIES, TOYS, sample, save_transformer

from .conftest import DEVICE, MODELS, assert_equal_in_fp32, cosines

pytestmark = pytest.mark.gpu

MAX_TOKENS = 160
LENGTHS = (128, 1, MAX_TOKENS, 2, 129, 127)
# Lowest cosine to fp32 on the CPU. A model's is promised; the toys' weights are random and ten times as wide as a
# model's, which makes rounding ten times as large: on a CPU they come to 0.99999 in fp16 and 0.9994 in bf16.
GATES = {("model", "fp16"): 0.9999, ("model", "bf16"): 0.9999, ("toy", "fp16"): 0.9999, ("toy", "bf16"): 0.998}
HALF = ("fp16", "bf16")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def gate(name: str, dtype: str) -> float:
    return GATES["toy" if name in TOYS or name in FAMILIES else "model", dtype]


def packs(family: str) -> bool:
    """Does this torch's kernel take the family's half-precision models?"""
    return DEVICE == "cuda" and family != "mpnet" and torch_varlen(grouped=family == "qwen3") is not None


def test_this_torch_has_the_packed_kernel(cuda: torch.device) -> None:
    assert torch.cuda.get_device_capability(cuda) >= (8, 0), "FlashAttention runs from Ampere on"
    assert torch_varlen(grouped=False) is not None, f"torch {torch.__version__} has no varlen_attn that we can use"


@pytest.mark.parametrize("dtype", ["auto", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_the_vectors_of_fp32_on_the_cpu(
    name: str, dtype: str, load: Callable[..., Engine], exact: Callable[[str], Engine]
) -> None:
    engine, texts = load(name, dtype), sample(60)
    family = TOYS[name].family if name in TOYS else "bert"
    if dtype == "auto" and DEVICE == "cuda":
        assert engine.dtype == ("bfloat16" if family in ("modernbert", "qwen3") else "float16")
    used = {str(word).removeprefix("torch."): short for short, word in DTYPES.items()}[engine.dtype]

    for kind in ("document", "query"):
        result = engine.embed(texts, kind)  # type: ignore[arg-type]
        expected = exact(name).embed(texts, kind)  # type: ignore[arg-type]

        assert np.array_equal(result.n_tokens, expected.n_tokens)
        if used == "fp32":
            assert_equal_in_fp32(result.vectors, expected.vectors)
        else:
            assert cosines(result.vectors, expected.vectors).min() >= gate(name, used)
    assert engine._backend.packed == (used != "fp32" and packs(family))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_alone_equals_in_a_batch(name: str, dtype: str, load: Callable[..., Engine]) -> None:
    engine, texts = load(name, dtype, batch_tokens=4_096), sample(25)

    together = engine.embed(texts)
    alone = np.vstack([engine.embed([text]).vectors for text in texts])

    assert together.timings.token_batches < len(texts), "no two texts shared a forward pass"
    if dtype == "fp32":
        assert_equal_in_fp32(together.vectors, alone)
    else:
        assert cosines(together.vectors, alone).min() >= 0.9999


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tokens_vector_at_every_length(family: str, dtype: str, tmp_path: Path) -> None:
    import transformers

    extra = 2 if family in ("xlm-roberta", "mpnet") else 0
    folder = save_transformer(tmp_path, family, max_position_embeddings=MAX_TOKENS + extra)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    numbers = np.random.default_rng(7)
    rows = [numbers.integers(5, 60, length).astype(np.int32) for length in LENGTHS]
    with torch.inference_mode():
        expected = [model(torch.from_numpy(row)[None].long()).last_hidden_state[0].numpy() for row in rows]
    build = Build(DTYPES[dtype], torch.device(DEVICE), 256, MAX_TOKENS)
    backend = NativeBackend.build(model, build, pad_id=model.config.pad_token_id or 0)
    assert backend is not None
    backend.careful = True  # in a rehearsal: the CPU's fast attention has too little room in fp16

    def tokens(given: list[Any]) -> list[Any]:
        hidden = backend(given)
        vectors, lengths = hidden.vectors.float().cpu(), hidden.lengths.cpu().tolist()
        if hidden.owners is not None:
            return [vector.numpy() for vector in vectors.split(lengths)]
        return [vectors[text, :length].numpy() for text, length in enumerate(lengths)]

    together = tokens(rows)
    for row, beside_others, wanted in zip(rows, together, expected, strict=True):
        (alone,) = tokens([row])
        if dtype == "fp32":
            assert_equal_in_fp32(beside_others, wanted)
            assert_equal_in_fp32(alone, wanted)
        else:
            # Single tokens have nothing to average out over, as texts have.
            assert cosines(beside_others, wanted).min() >= {"fp16": 0.9995, "bf16": 0.99}[dtype]
            assert cosines(alone, beside_others).min() >= {"fp16": 0.9999, "bf16": 0.9995}[dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_packed_and_padded_passes_agree(name: str, dtype: str, load: Callable[..., Engine], cuda: torch.device) -> None:
    """Two kernels on one device: FlashAttention without padding, torch's fused attention with it."""
    engine, texts = load(name, dtype), sample(40)
    one = engine._backend
    assert isinstance(one, NativeBackend)
    if not one.packed:
        pytest.skip("MPNet's scores have a bias: padded anyhow, or a torch before enable_gqa")
    packed = engine.embed(texts).vectors

    padding = NativeBackend(one._encoder, device=cuda, pad_id=one._pad_id, varlen=None)
    engine._backend = engine._runner.backend = padding
    padded = engine.embed(texts).vectors

    assert cosines(packed, padded).min() >= (0.9999 if dtype == "fp16" else gate(name, dtype))


@pytest.mark.parametrize("name", ["bert-prompt-excluded", "modernbert-cls-prompt-excluded", "qwen3-last"])
def test_windows_of_split_texts(name: str, load: Callable[..., Engine], exact: Callable[[str], Engine]) -> None:
    texts = ["word " * 400, "short", "one two three four " * 30]

    result = load(name).embed(texts, on_long=OnLong.SPLIT)

    expected = exact(name).embed(texts, on_long=OnLong.SPLIT).vectors
    assert cosines(result.vectors, expected).min() >= 0.998


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_transformers_own_forward(dtype: str, load: Callable[..., Engine], exact: Callable[[str], Engine]) -> None:
    """What serves the architectures that ours does not know."""
    if (DEVICE, dtype) == ("cpu", "fp16"):
        pytest.skip("autocast knows no fp16 on every CPU")
    engine, texts = load("bert-mean", dtype, backend="transformers"), sample(20)

    vectors = engine.embed(texts).vectors

    assert cosines(vectors, exact("bert-mean").embed(texts).vectors).min() >= 0.9999


def test_one_long_text_among_short_ones_needs_no_more_memory_than_its_tokens(
    load: Callable[..., Engine], exact: Callable[[str], Engine], cuda: torch.device
) -> None:
    texts = ["word " * 400, *(f"{number}" for number in range(4_000))]
    engine = load("all-MiniLM-L6-v2", batch_tokens=32_768)
    engine.embed(texts[:10])
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_allocated(cuda)

    result = engine.embed(texts)

    grid = len(texts) * engine.max_tokens * engine.dimensions * 2
    assert torch.cuda.max_memory_allocated(cuda) - before < grid / 2
    assert cosines(result.vectors[:50], exact("all-MiniLM-L6-v2").embed(texts[:50]).vectors).min() >= 0.9999
