"""Who embeds texts in the benchmarks, each in a process of its own: our engine and the libraries it is held against.

This module only lists them. The adapter that a peer names, a module of this package, is imported in the peer's
process (:mod:`chunkmill_workers.benchmarks.peers.serve`), which may be that of another virtual environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.names import OUR
from chunkmill_workers.benchmarks.stats import OUR_INT8, OURS, PEER, PEER_INT8, Gate

Setting = Mapping[str, Any]

BUDGETS = (1024, 512, 2048)
"""The most padded tokens of a batch, for the libraries that read token ids."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way of turning texts into vectors."""

    name: str
    adapter: str
    """Module with a function ``load``, which gives a :class:`chunkmill_workers.benchmarks.peers.serve.Adapter`."""
    precision: str
    """The number format of its matrix products: ``fp32``, ``bf16``, ``fp16`` or ``int8``."""
    threads: str
    """How it is told the number of threads, which is the same for all peers."""
    packages: tuple[str, ...]
    """The packages whose versions are recorded with its numbers."""
    options: Setting = field(default_factory=dict)
    """The options that make it different from other peers with the same adapter."""
    settings: tuple[Setting, ...] = ({},)
    """The settings that the sweep tries. The library's own default comes first."""
    needs: str | None = None
    """Which files :mod:`chunkmill_workers.benchmarks.peers.export` makes for it: ``pooled``, ``folder``, ..."""
    environment: str | None = None
    """Its own virtual environment, one of :data:`chunkmill_workers.benchmarks.peers.environments.REQUIREMENTS`."""
    cpu_only: bool = True

    @property
    def ours(self) -> bool:
        return self.name.startswith(OUR)

    @property
    def gate(self) -> Gate:
        """The cosines to the reference with which its speed counts."""
        if self.precision == "int8":
            return OUR_INT8 if self.ours else PEER_INT8
        return OURS if self.ours else PEER


def peers(half: str | None, device: str) -> list[Peer]:
    """Everyone, ours first. ``half`` is the half precision that ``device`` computes in; None where it has none.

    The grids hold what could plausibly win, not everything: each entry costs a start and three passes.
    """
    words = [half, "fp32"] if half else ["fp32"]
    return [
        *(_own_engine(word, {"dtype": word}, cpu_only=False) for word in words),
        _own_engine("int8", {"precision": "int8"}, cpu_only=True),
        _own_engine(words[0], {"dtype": words[0], "backend": "openvino"}, cpu_only=True),
        _own_engine("fp32", {"dtype": "fp32", "backend": "onnx"}, cpu_only=True),
        *_sentence_transformers(half, device),
        *(_onnx_runtime(word) for word in ("fp32", "int8")),
        _openvino(words[0], ("openvino",), {"hint": words[0]}, "pooled"),
        _openvino("int8", ("openvino", "nncf"), {"hint": words[0]}, "openvino int8"),
        _ctranslate2(),
        *(_fastembed(word) for word in ("fp32", "int8")),
        Peer(
            "sentence-transformers ONNX int8", _module("sentence_onnx"), "int8", "intra_op_num_threads",
            ("sentence-transformers", "transformers", "optimum-onnx", "onnxruntime"),
            settings=_settings("batch_size", 32, 4, 8, 16, 64), needs="folder",
            environment="sentence-transformers-onnx",
        ),
        Peer(
            f"Infinity {words[0]}", _module("infinity"), words[0], "torch.set_num_threads",
            ("infinity-emb", "sentence-transformers", "transformers", "torch"),
            {"engine": "torch", "dtype": words[0]}, _settings("batch_size", 32, 8, 16, 64), environment="infinity",
        ),
        Peer(
            "Infinity ONNX int8", _module("infinity"), "int8", "ONNX Runtime's default: one for each core",
            ("infinity-emb", "transformers", "optimum-onnx", "onnxruntime"),
            {"engine": "optimum"}, _settings("batch_size", 32, 8, 16, 64), needs="flat", environment="infinity",
        ),
    ]  # fmt: skip


def _own_engine(word: str, options: Setting, *, cpu_only: bool) -> Peer:
    """As it is shipped: its settings are not swept."""
    name = " ".join([OUR, *filter(None, [options.get("backend")]), word])
    return Peer(name, _module("own_engine"), word, "Engine.load(threads=)", ("torch",), options, cpu_only=cpu_only)


def _sentence_transformers(half: str | None, device: str) -> list[Peer]:
    """fp32 as it comes, which is the reference, and half precision with the batch that suits it."""
    sizes = (32, 8, 16, 64, 128) if device == "cpu" else (32, 128, 256, 512, 1024)
    settings = {"fp32": _settings("batch_size", 32)} | ({half: _settings("batch_size", *sizes)} if half else {})
    packages = ("sentence-transformers", "transformers", "torch")
    return [
        Peer(
            f"sentence-transformers {word}", _module("sentence_torch"), word, "torch.set_num_threads", packages,
            {"dtype": word}, tried, cpu_only=False,
        )
        for word, tried in settings.items()
    ]  # fmt: skip


def _onnx_runtime(word: str) -> Peer:
    settings = [dict(setting, graph=graph) for graph in ("fused", "plain") for setting in _settings("budget", *BUDGETS)]
    return Peer(
        f"ONNX Runtime {word}", _module("onnx_session"), word, "intra_op_num_threads", ("onnxruntime",),
        {"precision": word}, tuple(settings), needs="pooled" if word == "fp32" else "pooled int8",
    )  # fmt: skip


def _openvino(word: str, packages: tuple[str, ...], options: Setting, needs: str) -> Peer:
    settings = (*_settings("budget", *BUDGETS, 4096, streams=1), *_settings("budget", 1024, streams=machine.cores()))
    return Peer(
        f"OpenVINO {word}", _module("open_vino"), word, "INFERENCE_NUM_THREADS", packages,
        {"precision": word, **options}, settings, needs=needs,
    )  # fmt: skip


def _ctranslate2() -> Peer:
    settings = (
        *_settings("budget", *BUDGETS, 4096, compute_type="int8_float32", workers=1),
        *_settings("budget", 1024, compute_type="int8", workers=1),
        *_settings("budget", 1024, compute_type="int8_float32", workers=machine.cores()),
    )
    return Peer(
        "CTranslate2 int8",
        _module("ct2"),
        "int8",
        "inter_threads × intra_threads",
        ("ctranslate2",),
        {},
        settings,
        needs="ct2",
    )


def _fastembed(word: str) -> Peer:
    """As it comes, and with what a caller who knows that it does not sort would do."""
    settings = (*_settings("batch_size", 256, sort=False), *_settings("batch_size", 4, 8, 16, 32, sort=True))
    return Peer(
        f"fastembed {word}", _module("fast_embed"), word, "threads", ("fastembed", "onnxruntime"), {"precision": word},
        settings, needs="folder", environment="fastembed",
    )  # fmt: skip


def _module(name: str) -> str:
    return f"{__name__}.{name}"


def _settings(name: str, *values: int, **others: Any) -> tuple[Setting, ...]:
    return tuple({name: value, **others} for value in values)
