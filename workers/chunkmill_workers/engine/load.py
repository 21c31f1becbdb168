"""Loading a model: from the settings of an engine to the tokenizer, backend, head and token limit that it needs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.errors import InvalidSetting, ModelLoadError
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.models.files import read_json
from chunkmill_workers.engine.backends import Backend
from chunkmill_workers.engine.backends.adapters import merge
from chunkmill_workers.engine.backends.exported import why_not_exported
from chunkmill_workers.engine.backends.generic import TransformersBackend
from chunkmill_workers.engine.backends.int8 import Int8Backend, load_int8, require_int8
from chunkmill_workers.engine.backends.loading import load_model
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.backends.onnx import OnnxBackend
from chunkmill_workers.engine.backends.openvino import OpenVinoBackend
from chunkmill_workers.engine.backends.static import STATIC_BATCH_TOKENS, StaticBackend
from chunkmill_workers.engine.backends.stored import StoredModel, read_stored
from chunkmill_workers.engine.encoder.architectures import Build
from chunkmill_workers.engine.pooling import Head
from chunkmill_workers.engine.precision import (
    cpu_threads,
    default_batch_tokens,
    device_name,
    resolve_device,
    resolve_dtype,
)
from chunkmill_workers.engine.probe import MEMORY
from chunkmill_workers.engine.token_limit import TokenLimit
from chunkmill_workers.engine.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "native", "transformers", "onnx", "openvino"]


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of. All parts are on the same device."""

    folder: ModelFolder
    tokenizer: TextTokenizer
    backend: Backend
    head: Head
    token_limit: TokenLimit
    threads: int
    """Threads that torch may use on a CPU."""
    query: EngineParts | None = None
    """What makes the vectors of queries, if that is something else."""


def load_parts(
    model: str | ModelFolder,
    *,
    device: str,
    dtype: str,
    batch_tokens: int | None,
    pooling: str | None,
    on_long: OnLong,
    precision: Precision,
    backend: BackendName,
    learned: Path | None,
    threads: int | None,
) -> EngineParts:
    """The parts of an engine. Arguments and errors are those of :meth:`chunkmill_workers.engine.engine.Engine.load`."""
    if batch_tokens is not None and batch_tokens < 1:
        raise InvalidSetting(f"EMBEDDING_BATCH_TOKENS is {batch_tokens}: it must be positive")
    threads = threads or cpu_threads()
    on = resolve_device(device)
    if isinstance(model, str):
        model = resolve_model(model, pooling=pooling, on_long=on_long, precision=precision)
    folder = model
    if Precision(precision) is Precision.INT8 and folder.spec.precision is not Precision.INT8:
        raise InvalidSetting(
            "precision is int8 and the model's folder was read for float: give precision to resolve_model too"
        )
    if backend in ("onnx", "openvino") and not folder.static and (reason := why_not_exported(folder)) is not None:
        raise InvalidSetting(
            f"backend {backend} cannot run model {folder.name!r}, because {reason}: set EMBEDDING_BACKEND=auto"
        )
    options = _Options(device=on, dtype=dtype, batch_tokens=batch_tokens, backend=backend, learned=learned)
    parts = _load_side(folder, options, threads)
    return parts if folder.query is None else replace(parts, query=_load_queries(parts, folder.query, options))


@dataclass(frozen=True, slots=True)
class _Options:
    """What `load_parts` was asked for."""

    device: torch.device
    dtype: str
    batch_tokens: int | None
    backend: BackendName
    learned: Path | None


def _load_queries(documents: EngineParts, folder: ModelFolder, options: _Options) -> EngineParts:
    """The parts for queries. They share the weights of ``documents`` if these are the same and two threads may use them
    at a time. Otherwise the weights are loaded twice, because each engine has a device thread of its own."""
    own = documents.folder
    same = (folder.transformer, folder.adapter, folder.lowercase) == (own.transformer, own.adapter, own.lowercase)
    if (
        same
        and folder.static == own.static
        and documents.backend.concurrent
        and folder.spec.precision is Precision.FLOAT
    ):
        return replace(documents, folder=folder, head=Head(folder, documents.backend.device))
    return _load_side(folder, options, documents.threads)


def _load_static(folder: ModelFolder, options: _Options, threads: int) -> EngineParts:
    """A static model has one way to be computed, whatever backend, device and number format are for other models."""
    tokenizer = TextTokenizer.load_static(folder.transformer)
    backend = StaticBackend.load(folder)
    tokenizer.check({}, backend.embedding_rows)
    token_limit = TokenLimit(options.batch_tokens or STATIC_BATCH_TOKENS)
    return EngineParts(folder, tokenizer, backend, Head(folder, backend.device), token_limit, threads)


def _load_side(folder: ModelFolder, options: _Options, threads: int) -> EngineParts:
    """The parts of an engine for documents, or for queries."""
    if folder.static:
        return _load_static(folder, options, threads)
    on, dtype, backend, learned = options.device, options.dtype, options.backend, options.learned
    config = read_json(folder.transformer / "config.json")
    tokenizer = TextTokenizer.load(folder.transformer, lowercase=folder.lowercase)
    tokens = options.batch_tokens or default_batch_tokens(on)
    if backend == "onnx" and dtype == "auto":
        dtype = "fp32"  # the only number format of this backend
    if dtype == "auto" and MEMORY.needs_fp32(folder, on):
        dtype = "fp32"
    number_format = resolve_dtype(dtype, on, config.get("model_type", ""))
    head = Head(folder, on)
    pad_id = _pad_id(tokenizer, config)
    loaded: Backend
    if folder.spec.precision is Precision.INT8:
        require_int8(on, backend, number_format)
        build = Build(number_format, on, tokens, folder.spec.max_tokens)
        loaded = load_int8(
            _stored(folder) or _load_adapted(folder),
            build,
            spec=folder.spec,
            tokenizer=tokenizer,
            config=config,
            head=head,
            pad_id=pad_id,
        )
    else:
        loaded = _load_backend(
            folder, backend, device=on, dtype=number_format, slots=tokens, pad_id=pad_id, threads=threads
        )
    tokenizer.check(config, loaded.embedding_rows)
    format_word = str(loaded.dtype).removeprefix("torch.")
    name = f"{device_name(on)}-{folder.spec.fingerprint[:16]}-{loaded.name}-{format_word}.json"
    token_limit = TokenLimit(tokens, learned / name if learned is not None else None, least=folder.spec.max_tokens)
    return EngineParts(folder, tokenizer, loaded, head, token_limit, threads)


class ExactTwin:
    """The same weights in fp32 and without shortcuts, for texts whose vector was not finite.

    It is loaded by the first call. The products of an int8 model stay in int8, because an fp32 vector does not belong
    to an int8 space.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._loading = threading.Lock()
        self.backend: Backend | None = None
        """The twin; None until it is needed for the first time."""

    def __call__(self) -> Backend:
        """The twin. Raises what `Engine.load` raises if the model cannot be loaded a second time."""
        usual = self._parts.backend
        with self._loading:
            if self.backend is None and isinstance(usual, StaticBackend):
                self.backend = usual  # it is fp32, and has no shortcuts
            if self.backend is None and isinstance(usual, Int8Backend):
                self.backend = usual.careful_twin()
            if self.backend is None:
                folder, tokenizer = self._parts.folder, self._parts.tokenizer
                logger.warning(
                    "a vector of %s is not finite in %s: loading the model in fp32 beside it for such texts",
                    folder.spec.model,
                    str(usual.dtype).removeprefix("torch."),
                )
                self.backend = _load_backend(
                    folder,
                    "auto",
                    device=usual.device,
                    dtype=torch.float32,
                    slots=64,
                    threads=cpu_threads(),
                    pad_id=_pad_id(tokenizer, read_json(folder.transformer / "config.json")),
                )
                for backend in (self.backend, usual):
                    if isinstance(backend, NativeBackend):
                        backend.careful = True
            return self.backend


def _stored(folder: ModelFolder) -> StoredModel | None:
    """The model of a file that need not be loaded with transformers; None if it has to be."""
    return None if folder.adapter else read_stored(folder, read_json(folder.transformer / "config.json"))


def _load_adapted(folder: ModelFolder) -> Any:
    """The model as transformers loads it, with the adapter of its task."""
    model = load_model(folder)
    if folder.adapter is not None:
        merge(model, folder.adapter)
    return model


def _pad_id(tokenizer: TextTokenizer, config: Mapping[str, Any]) -> int:
    return tokenizer.pad_id if tokenizer.pad_id is not None else config.get("pad_token_id") or 0


def _load_backend(
    folder: ModelFolder,
    name: BackendName,
    *,
    device: torch.device,
    dtype: torch.dtype,
    slots: int,
    pad_id: int,
    threads: int,
) -> Backend:
    """The backend called ``name``, with the model in ``dtype`` on ``device``.

    ``auto`` is our own forward pass, or that of transformers for an architecture that ours does not know. ``slots`` is
    the usual number of tokens in a pass. Raises InvalidSetting or ModelLoadError.
    """
    if name in ("onnx", "openvino"):
        if device.type != "cpu":
            raise InvalidSetting(f"backend {name} runs on the CPU: set EMBEDDING_DEVICE=cpu, or EMBEDDING_BACKEND=auto")
        exported = OnnxBackend if name == "onnx" else OpenVinoBackend
        return exported.load(folder, dtype=dtype, threads=threads, pad_id=pad_id)
    build = Build(dtype, device, slots, folder.spec.max_tokens)
    try:
        if name != "transformers":
            stored = _stored(folder)
            native = None if stored is None else NativeBackend.build(stored, build, pad_id=pad_id)
            if native is not None:
                return native
        model = _load_adapted(folder)
        if name != "transformers":
            native = NativeBackend.build(model, build, pad_id=pad_id)
            if native is not None:
                return native
            if name == "native":
                raise InvalidSetting(
                    f"backend native does not know the architecture {model.config.model_type}: use auto or transformers"
                )
        return TransformersBackend(model, dtype=dtype, device=device, pad_id=pad_id)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"the model in {folder.transformer} does not fit {device}: {error}") from error
