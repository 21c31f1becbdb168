"""Small models with random weights, one of every family, saved by sentence-transformers itself.

What it saves is what it reads, so its own ``encode_document`` and ``encode_query`` are the reference.
"""

from __future__ import annotations

import ast
import math
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from chunkmill_workers.engine import Engine

from .faulty import FaultyBackend, Load

MAX_TOKENS = 48


@cache
def libraries() -> tuple[Any, Any]:
    """sentence-transformers and transformers.

    They are imported when a test first needs them: that takes six seconds, and each pytest process imports this file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own deprecations, at import
        import sentence_transformers.sentence_transformer.modules
        import transformers
    return sentence_transformers, transformers


@cache
def stdlib_docstrings() -> tuple[str, ...]:
    """Distinct docstrings of some of Python's own modules, all lengths mixed."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "collections/__init__", "decimal", "inspect", "statistics", "typing")
    trees = (ast.parse((folder / f"{name}.py").read_text(encoding="utf-8")) for name in names)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings_there = [
        ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, documented)
    ]
    return tuple(dict.fromkeys(text for text in docstrings_there if text))


ODD_TEXTS = (
    ".",
    "",
    "   ",
    "\n\t",
    "ein Straßenfest, naïve café, Ωmega, İstanbul",
    "漢字かな交じり文と한국어 텍스트",
    "😀😃 emoji \u200d joined \u202e reversed \x00 nul",
    "a" * 500,
    "[SEP] [CLS] <s> </s> <pad> literal special tokens",
    "word " * 400,
)


def sample(count: int) -> list[str]:
    """``count`` docstrings spread over all, and the odd texts."""
    every = stdlib_docstrings()
    return [*every[:: max(1, len(every) // count)][:count], *ODD_TEXTS]


def _wordpiece(specials: list[str], unknown: str) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=specials))


def _unigram(specials: list[str], unknown: str) -> Any:
    """Pieces of words, by how often they occur. The library's trainer gives another vocabulary in each process."""
    counts: Counter[str] = Counter()
    for text in stdlib_docstrings()[:150]:
        for word in text.split():
            marked = f"▁{word}"
            ends = ((at, end) for at in range(len(marked)) for end in range(at + 1, min(at + 6, len(marked)) + 1))
            counts.update(marked[at:end] for at, end in ends)
    by_use = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece] * len(piece), piece))
    total = counts.total()
    pieces = [piece for piece in by_use if piece not in specials][: 500 - len(specials)]
    scores = [(special, 0.0) for special in specials] + [(piece, math.log(counts[piece] / total)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, specials.index(unknown), byte_fallback=False))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _byte_bpe(specials: list[str], unknown: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet)
    return _trained(tokenizer, trainer)


def _trained(tokenizer: Any, trainer: Any) -> Any:
    trainer.show_progress = False
    tokenizer.train_from_iterator(stdlib_docstrings()[:150], trainer)
    return tokenizer


@dataclass(frozen=True)
class Family:
    """How to build one architecture small: its classes, its special tokens and its tokenizer's kind."""

    config: str
    model: str
    tokenizer: Callable[[list[str], str], Any]
    first: str | None
    last: str | None
    pad: str
    unknown: str
    options: dict[str, Any] = field(default_factory=dict)


_BERT_LIKE = {"first": "[CLS]", "last": "[SEP]", "pad": "[PAD]", "unknown": "[UNK]"}
_ROBERTA_LIKE = {"first": "<s>", "last": "</s>", "pad": "<pad>", "unknown": "<unk>"}
FAMILIES = {
    "bert": Family("BertConfig", "BertModel", _wordpiece, **_BERT_LIKE),
    # As multilingual-e5-small: BERT with the tokenizer of XLM-RoBERTa, and config.json keeps BERT's pad id.
    "multilingual-bert": Family(
        "BertConfig", "BertModel", _unigram, **_ROBERTA_LIKE, options={"pad_token_id": 0},
    ),
    "xlm-roberta": Family(
        "XLMRobertaConfig", "XLMRobertaModel", _unigram, **_ROBERTA_LIKE,
        options={"max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1},
    ),
    "mpnet": Family(
        "MPNetConfig", "MPNetModel", _wordpiece, **_ROBERTA_LIKE,
        options={"max_position_embeddings": MAX_TOKENS + 2},
    ),
    "nomic": Family("NomicBertConfig", "NomicBertModel", _wordpiece, **_BERT_LIKE),
    "modernbert": Family(
        "ModernBertConfig", "ModernBertModel", _byte_bpe, **_BERT_LIKE,
        options={"num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 16},
    ),
    "qwen3": Family(
        "Qwen3Config", "Qwen3Model", _byte_bpe,
        first=None, last="<|endoftext|>", pad="<|endoftext|>", unknown="<|endoftext|>",
        # As Qwen3-Embedding: padding is the end token, and config.json names no pad id.
        options={"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None},
    ),
}  # fmt: skip
# Families that run through transformers.
OTHER_FAMILIES = {
    "deberta": Family(
        "DebertaConfig", "DebertaModel", _byte_bpe, **_BERT_LIKE,
        # As microsoft/deberta-base.
        options={"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1,
                 "position_biased_input": False, "type_vocab_size": 0},
    ),
    "t5": Family(
        "T5Config", "T5EncoderModel", _unigram, first=None, last="</s>", pad="<pad>", unknown="<unk>",
        options={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 1.5},
    ),
    "eurobert": Family(
        "EuroBertConfig", "EuroBertModel", _byte_bpe, first="<|begin_of_text|>", last="<|end_of_text|>", pad="<|pad|>",
        unknown="<|unk|>", options={"num_key_value_heads": 2},
    ),
    "gte": Family("GteConfig", "GteModel", _unigram, **_ROBERTA_LIKE),
    "jina-v3": Family(
        "JinaEmbeddingsV3Config", "JinaEmbeddingsV3Model", _unigram, **_ROBERTA_LIKE, options={"type_vocab_size": 1},
    ),
    # As EmbeddingGemma 2: its token vectors are projected to another width.
    "embedding-gemma2": Family(
        "EmbeddingGemma2TextConfig", "EmbeddingGemma2TextModel", _byte_bpe, first="<bos>", last="<eos>", pad="<pad>",
        unknown="<unk>",
        options={"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
                 "embedding_dim": 48, "sliding_window": 8},
    ),
}  # fmt: skip


def save_transformer(folder: Path, family: str, *, seed: int = 0, **options: Any) -> Path:
    """A plain transformers folder with random weights."""
    _, transformers = libraries()
    kind = (FAMILIES | OTHER_FAMILIES)[family]
    specials = list(dict.fromkeys(token for token in (kind.first, kind.pad, kind.last, kind.unknown) if token))
    tokenizer = kind.tokenizer(specials, kind.unknown)
    around = [token for token in (kind.first, kind.last) if token]
    template = " ".join(token for token in (kind.first, "$A", kind.last) if token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)]
    )
    names = {"pad_token": kind.pad, "unk_token": kind.unknown, "sep_token": kind.last, "eos_token": kind.last}
    if kind.first:
        names |= {"cls_token": kind.first, "bos_token": kind.first}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **names)
    settings = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": tokenizer.token_to_id(kind.pad),
        "bos_token_id": tokenizer.token_to_id(kind.first) if kind.first else None,
        "eos_token_id": tokenizer.token_to_id(kind.last),
        "initializer_range": 0.3,  # wide, so that vectors of different texts differ by more than rounding
    }
    if family == "modernbert":
        settings |= {"cls_token_id": settings["bos_token_id"], "sep_token_id": settings["eos_token_id"]}
    config = getattr(transformers, kind.config)(**settings | kind.options | options)
    torch.manual_seed(seed)
    getattr(transformers, kind.model)(config).eval().save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Toy:
    """One model to build: family, pooling in sentence-transformers' word, and what follows."""

    family: str
    pooling: str = "mean"
    normalize: bool = True
    dense: str | None = None
    prompts: tuple[tuple[str, str], ...] = ()
    include_prompt: bool = True
    width: int = 32
    """Numbers in a token vector."""


TOYS = {
    "bert-mean": Toy("bert"),
    "bert-prompt-excluded": Toy(
        "bert",
        dense="Identity",
        prompts=(("query", "search for this: "), ("document", "title: ")),
        include_prompt=False,
    ),
    "bert-max": Toy("bert", "max", normalize=False),
    "multilingual-bert-mean": Toy("multilingual-bert", prompts=(("query", "query: "), ("document", "passage: "))),
    "xlm-roberta-cls": Toy("xlm-roberta", "cls", normalize=False),
    "xlm-roberta-passage": Toy("xlm-roberta", prompts=(("query", "query: "), ("passage", "passage: "))),
    "mpnet-dense": Toy("mpnet", "mean", dense="Tanh"),
    "nomic-sqrt": Toy("nomic", "mean_sqrt_len_tokens", normalize=False, prompts=(("query", "search_query: "),)),
    "modernbert-max": Toy("modernbert", "max"),
    "modernbert-cls-prompt-excluded": Toy(
        "modernbert", "cls", prompts=(("document", "passage: "),), include_prompt=False
    ),
    "qwen3-last": Toy("qwen3", "lasttoken", prompts=(("query", "Instruct: find it\nQuery:"),)),
    "qwen3-mean": Toy("qwen3", "mean", normalize=False),
}


def save_toy(folder: Path, toy: Toy) -> Path:
    """A sentence-transformers folder, written by sentence-transformers."""
    sentence_transformers, _ = libraries()
    st_modules = sentence_transformers.sentence_transformer.modules
    plain = save_transformer(folder / "plain", toy.family)
    torch.manual_seed(1)
    modules: list[Any] = [
        st_modules.Transformer(str(plain)),
        st_modules.Pooling(toy.width, pooling_mode=toy.pooling, include_prompt=toy.include_prompt),
    ]
    if toy.dense is not None:
        activation = getattr(torch.nn, toy.dense)()
        modules.append(st_modules.Dense(toy.width, 24, activation_function=activation))
    if toy.normalize:
        modules.append(st_modules.Normalize())
    saved = folder / "saved"
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu", prompts=dict(toy.prompts) or None).save(
        str(saved), create_model_card=False
    )
    return saved


def reference(path: Path | str) -> Any:
    """sentence-transformers on the same folder."""
    sentence_transformers, _ = libraries()
    return sentence_transformers.SentenceTransformer(str(path), device="cpu", local_files_only=True)


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a toy by its name in TOYS, built once."""

    @cache
    def build(name: str) -> Path:
        return save_toy(tmp_path_factory.mktemp(name), TOYS[name])

    return build


@pytest.fixture(scope="session")
def toy_engine(toy_path: Callable[[str], Path]) -> Callable[[str], Engine]:
    """fp32 engine of a toy by its name; a small token limit, so that even a few texts make several TokenBatches."""

    @cache
    def load(name: str) -> Engine:
        return Engine.load(str(toy_path(name)), device="cpu", dtype="fp32", batch_tokens=256)

    return load


@pytest.fixture(scope="session")
def minilm() -> Iterator[Engine]:
    yield Engine.load("all-MiniLM-L6-v2", device="cpu", dtype="fp32")


@pytest.fixture
def load(toy_path: Callable[[str], Path]) -> Load:
    def build(
        dtype: str = "fp32", learned: Path | None = None, name: str = "bert-mean"
    ) -> tuple[Engine, FaultyBackend]:
        """An engine whose backend, and whose fp32 twin for second chances, can be told to fail."""
        engine = Engine.load(
            str(toy_path(name)), device="cpu", dtype=dtype, batch_tokens=512, learned=learned, threads=1
        )
        faulty = FaultyBackend(engine._backend)
        engine._runner.backend = faulty
        return engine, faulty

    return build
