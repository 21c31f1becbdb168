"""The forward pass of a GPU, on the CPU: packed texts, everything but the attention kernel itself.

In its place stands :func:`plain_varlen`, which takes the real one's arguments and refuses what that would refuse.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from chunkmill.domain.spaces import AnyPooling, OnLong, Pooling, pooling_of
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.encoder.architectures import Build, build_encoder
from chunkmill_workers.engine.encoder.attention import Heads, find_varlen
from chunkmill_workers.engine.encoder.layout import lay_out
from chunkmill_workers.engine.pooling import pool
from chunkmill_workers.engine.windows import Ids

from .conftest import FAMILIES, TOYS, libraries, reference, sample, save_transformer
from .plain_varlen import plain_varlen

CPU = torch.device("cpu")
MAX_TOKENS = 160
LENGTHS = (1, 2, 127, 128, 129, MAX_TOKENS)
PACKED_TOYS = [name for name, toy in TOYS.items() if toy.family != "mpnet"]  # MPNet's scores have a bias


@pytest.fixture
def varlen() -> ModuleType:
    """The module of torch's kernel. Its import takes a second, so that only the tests that need it pay for it."""
    return importlib.import_module("torch.nn.attention.varlen")


def packed(engine: Engine) -> Engine:
    """The engine, with packed passes from now on."""
    padded = engine._backend
    assert isinstance(padded, NativeBackend)
    backend = NativeBackend(padded._encoder, device=CPU, pad_id=padded._pad_id, varlen=plain_varlen)
    assert backend.packed
    engine._backend = engine._runner.backend = backend
    return engine


def load_packed(path: Path | str, dtype: str = "fp32", **options: Any) -> Engine:
    return packed(Engine.load(str(path), device="cpu", dtype=dtype, **{"batch_tokens": 256} | options))


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """transformers' model of a family that reads 160 tokens, built once."""
    made: dict[str, Any] = {}

    def build(family: str) -> Any:
        if family not in made:
            extra = 2 if family in ("xlm-roberta", "mpnet") else 0
            options = {"max_position_embeddings": MAX_TOKENS + extra}
            folder = save_transformer(tmp_path_factory.mktemp(family), family, **options)
            made[family] = libraries()[1].AutoModel.from_pretrained(folder).eval()
        return made[family]

    return build


def rows_of(lengths: tuple[int, ...], pad_id: int) -> list[Ids]:
    """Random ids; from the third token on, every fifth spells out the padding token."""
    numbers = np.random.default_rng(7)
    rows = [numbers.integers(5, 60, length).astype(np.int32) for length in lengths]
    for row in rows:
        row[2::5] = pad_id
    return rows


def alone(model: Any, row: Ids) -> NDArray[np.float32]:
    """(length, hidden): transformers' own forward."""
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(row)[None].long())
    return output.last_hidden_state[0].numpy()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mpnet"])
def test_every_tokens_vector_is_transformers_own(family: str, long_model: Callable[[str], Any]) -> None:
    model = long_model(family)
    encoder = build_encoder(model, Build(torch.float32, CPU, 256, MAX_TOKENS))
    pad_id = model.config.pad_token_id or 0
    backend = NativeBackend(encoder, device=CPU, pad_id=pad_id, varlen=plain_varlen)
    rows = rows_of((128, 1, MAX_TOKENS, 2, 129, 127), pad_id)
    expected = [alone(model, row) for row in rows]

    together = backend(rows)
    ends = np.cumsum(together.lengths.numpy())
    only = np.array([0, 0, 17, 1, 128, 60])
    picked = backend(rows, only=only)

    assert together.vectors.shape == (sum(map(len, rows)), 32)
    assert together.owners.tolist() == [text for text, row in enumerate(rows) for _ in row]
    for row, end, tokens, one, at in zip(rows, ends, expected, picked.vectors, only, strict=True):
        np.testing.assert_allclose(together.vectors[end - len(row) : end], tokens, atol=1e-5, rtol=0)
        np.testing.assert_allclose(backend([row]).vectors, tokens, atol=1e-5, rtol=0)
        np.testing.assert_allclose(one[0], tokens[at], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PACKED_TOYS)
@pytest.mark.parametrize("kind", ["document", "query"])
def test_every_toy_gives_the_vectors_of_sentence_transformers(
    name: str, kind: str, toy_path: Callable[[str], Path]
) -> None:
    texts = sample(30)
    engine = load_packed(toy_path(name))
    expected = reference(toy_path(name))

    result = engine.embed(texts, "query" if kind == "query" else "document")
    alone = np.vstack([engine.embed([text], "query" if kind == "query" else "document").vectors for text in texts])

    encode = expected.encode_query if kind == "query" else expected.encode_document
    np.testing.assert_allclose(result.vectors, encode(texts), atol=1e-5, rtol=0)
    np.testing.assert_allclose(result.vectors, alone, atol=1e-5, rtol=0)
    assert result.timings.token_batches < len(texts), "no two texts shared a pass"
    assert result.timings.padded_tokens == result.timings.tokens, "a packed pass has no padding"


@pytest.mark.parametrize(
    ("dtype", "gate"), [("fp32", None), pytest.param("fp16", 0.9999, marks=pytest.mark.slow), ("bf16", 0.9999)]
)
def test_minilm_at_the_lengths_where_kernels_go_wrong(dtype: str, gate: float | None, minilm: Engine) -> None:
    texts = ["", *("word " * (length - 2) for length in (3, 127, 128, 129, 256, 400)), *sample(10)]
    engine = load_packed("all-MiniLM-L6-v2", dtype, batch_tokens=2_000)

    result = engine.embed(texts)

    assert result.n_tokens[:7].tolist() == [2, 3, 127, 128, 129, 256, 400]
    expected = minilm.embed(texts).vectors
    if gate is None:
        np.testing.assert_allclose(result.vectors, expected, atol=1e-5, rtol=0)
    else:
        assert (result.vectors * expected).sum(1).min() >= gate
        assert np.abs(result.vectors - expected).max() > 1e-5, "half precision was not used at all"


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("name", PACKED_TOYS)
def test_half_precision_does_not_look_at_the_neighbours(name: str, dtype: str, toy_path: Callable[[str], Path]) -> None:
    engine, texts = load_packed(toy_path(name), dtype), sample(15)

    together = engine.embed(texts).vectors
    alone = np.vstack([engine.embed([text]).vectors for text in texts])

    norms = np.linalg.norm(together, axis=1) * np.linalg.norm(alone, axis=1)
    assert ((together * alone).sum(1) / norms).min() >= 0.9999


@pytest.mark.parametrize("name", ["bert-prompt-excluded", "modernbert-cls-prompt-excluded", "qwen3-mean"])
def test_windows_of_split_texts(
    name: str, toy_path: Callable[[str], Path], toy_engine: Callable[[str], Engine]
) -> None:
    texts = ["word " * 400, "short", "one two three four " * 30]

    result = load_packed(toy_path(name)).embed(texts, on_long=OnLong.SPLIT)

    assert not result.truncated.any()
    expected = toy_engine(name).embed(texts, on_long=OnLong.SPLIT).vectors
    np.testing.assert_allclose(result.vectors, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [*(mode for mode in Pooling if mode is not Pooling.PROVIDER), pooling_of("cls+mean")])
@pytest.mark.parametrize("skipping", [False, True])
def test_packed_texts_are_pooled_as_padded_ones(mode: AnyPooling, skipping: bool) -> None:
    lengths = torch.tensor([3, 1, 7, 2])
    skips = torch.tensor([1, 2, 0, 2], dtype=torch.int32) if skipping else None  # two have nothing left
    inside = torch.arange(7) < lengths[:, None]
    grid = torch.randn(4, 7, 5)
    padded = TokenVectors(grid.masked_fill(~inside[..., None], 1e6), lengths)
    together = TokenVectors(grid[inside], lengths, torch.repeat_interleave(lengths))

    torch.testing.assert_close(pool(together, mode, skips), pool(padded, mode, skips))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def test_one_long_text_among_short_ones_makes_no_grid(long_model: Callable[[str], Any]) -> None:
    encoder = build_encoder(long_model("bert"), Build(torch.float32, CPU, 256, MAX_TOKENS))
    backend = NativeBackend(encoder, device=CPU, pad_id=0, varlen=plain_varlen)
    rows = rows_of((MAX_TOKENS, *[2] * 300), 0)
    tokens = sum(map(len, rows))

    with _Largest() as largest:
        pool(backend(rows), Pooling.MEAN)

    weights = encoder.words.numel()
    assert largest.numbers <= max(tokens * 3 * 32, MAX_TOKENS**2 * 4, weights), "larger than queries, keys and values"


def test_a_modernbert_of_transformers_before_5_runs_through_transformers(long_model: Callable[[str], Any]) -> None:
    """Its configuration does not say which layers see only their neighbours."""
    build = Build(torch.float32, CPU, 256, MAX_TOKENS)
    model = copy.copy(long_model("modernbert"))
    assert build_encoder(model, build) is not None
    said = {name: value for name, value in model.config.to_dict().items() if name != "layer_types"}
    model.config = SimpleNamespace(**said)

    assert build_encoder(model, build) is None


def test_the_layout_of_packed_texts() -> None:
    rows = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8], [9, 10])]

    layout = lay_out(rows, packed=True, pad_id=0, device=CPU)

    assert layout.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert layout.offsets.tolist() == [0, 3, 4, 6]
    assert layout.offsets.dtype == torch.int32
    assert layout.at.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout.lengths.tolist() == [3, 1, 2]
    assert layout.slots(torch.tensor([2, 0, 1])).tolist() == [2, 3, 5]
    assert (layout.longest, len(layout.padding)) == (3, 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


def test_the_kernel_serves_the_models_that_it_can(hopper: torch.device, varlen: ModuleType) -> None:
    for heads in (Heads(12, 12, 64), Heads(12, 12, 32), Heads(16, 8, 128), Heads(4, 4, 256)):
        for dtype in (torch.float16, torch.bfloat16):
            assert find_varlen(heads, dtype, hopper) is varlen.varlen_attn


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        (Heads(12, 12, 64), torch.float32),
        (Heads(12, 12, 20), torch.float16),
        (Heads(2, 2, 264), torch.bfloat16),
    ],
)
def test_the_others_run_padded(heads: Heads, dtype: torch.dtype, hopper: torch.device) -> None:
    assert find_varlen(heads, dtype, hopper) is None
    assert find_varlen(Heads(12, 12, 64), torch.float16, CPU) is None


def test_a_gpu_before_ampere_runs_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    assert find_varlen(Heads(12, 12, 64), torch.float16, torch.device("cuda", 0)) is None


def test_a_torch_that_cannot_share_keys_runs_such_models_padded(
    hopper: torch.device, varlen: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,  # type: ignore[no-untyped-def]
                      window_size=(-1, -1)):  # fmt: skip
        return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    assert "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_11)

    assert find_varlen(Heads(16, 8, 128), torch.bfloat16, hopper) is None
    assert find_varlen(Heads(12, 12, 64), torch.float16, hopper) is of_torch_2_11


def test_a_kernel_that_cannot_share_keys_is_not_told_about_it(toy_path: Callable[[str], Path]) -> None:
    def strict(*args: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        return plain_varlen(*args, scale=scale, window_size=window_size)

    engine = load_packed(toy_path("bert-mean"))
    engine._backend._varlen = strict  # type: ignore[attr-defined]
    texts = sample(5)

    vectors = engine.embed(texts).vectors

    np.testing.assert_allclose(vectors, reference(toy_path("bert-mean")).encode_document(texts), atol=1e-5, rtol=0)


def test_scores_with_a_bias_run_padded(long_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """MPNet; the kernel has no argument for one."""
    asked: list[Heads] = []
    monkeypatch.setattr(
        "chunkmill_workers.engine.backends.native.find_varlen",
        lambda heads, dtype, device: asked.append(heads) or plain_varlen,
    )
    build = Build(torch.float32, CPU, 256, MAX_TOKENS)

    mpnet = NativeBackend.build(long_model("mpnet"), build, pad_id=0)
    bert = NativeBackend.build(long_model("bert"), build, pad_id=0)

    assert (mpnet.packed, bert.packed) == (False, True)
    assert asked == [Heads(4, 4, 8)]
