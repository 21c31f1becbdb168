"""The engine: text in, vectors out. It knows no database and no broker, and returns its timings.

tokenizer → windows (policy for long texts) → loop (packing) → run → backend → pooling → collect, each in a file of
its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec
from chunkmill.errors import EngineError, InvalidSetting, ModelLoadError
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.models.files import read_json
from chunkmill_workers.engine.backends import Backend
from chunkmill_workers.engine.backends.generic import TransformersBackend
from chunkmill_workers.engine.backends.int8 import Int8Backend, load_int8, require_int8
from chunkmill_workers.engine.backends.loading import load_model
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.backends.onnx import OnnxBackend
from chunkmill_workers.engine.backends.openvino import OpenVinoBackend
from chunkmill_workers.engine.budget import Budget
from chunkmill_workers.engine.collect import Collector
from chunkmill_workers.engine.encoder.architectures import Build
from chunkmill_workers.engine.loop import DeviceLoop, Done
from chunkmill_workers.engine.pooling import Head
from chunkmill_workers.engine.precision import (
    cpu_threads,
    default_batch_tokens,
    device_name,
    resolve_device,
    resolve_dtype,
)
from chunkmill_workers.engine.results import Embeddings, TextFailure, Timings, TokenBatchResult
from chunkmill_workers.engine.run import Runner
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.engine.under_way import UnderWay
from chunkmill_workers.engine.windows import Rows, make_rows

logger = logging.getLogger(__name__)

Kind = Literal["document", "query"]

BackendName = Literal["auto", "native", "transformers", "onnx", "openvino"]

# Texts per call of the Rust tokenizer: enough to keep its threads busy, few enough that `stop` is heard. Nor more
# characters, as there may be in texts of many megabytes, than it takes a few seconds for.
_TOKENIZER_CALL = 1_024
_TOKENIZER_CHARACTERS = 4_000_000


class Engine:
    """One model on one device, shared by the threads of a worker."""

    def __init__(
        self,
        folder: ModelFolder,
        tokenizer: TextTokenizer,
        backend: Backend,
        head: Head,
        *,
        budget: Budget,
        on_long: OnLong,
        threads: int = 1,
    ) -> None:
        self.spec: SpaceSpec = folder.spec
        self.on_long = on_long
        self._folder = folder
        self._tokenizer = tokenizer
        self._backend = backend
        self._head = head
        self._budget = budget
        self._exact: Backend | None = None
        self._exact_loading = threading.Lock()
        self._runner = Runner(
            backend,
            head,
            probe=tokenizer.probe,
            dimensions=self.dimensions,
            exact=self._load_exact,
            shrink=budget.shrink,
        )
        self._loop = DeviceLoop(self._runner, budget, threads=threads)
        self._tokenizing = UnderWay()
        self.steps = {"a forward pass": self._loop.passes, "a call of the tokenizer": self._tokenizing}
        """What may hang in here, by its name."""
        for prompt in (folder.spec.document_prompt, folder.spec.query_prompt):
            frame = tokenizer.frame(prompt)
            if frame.skip + len(frame.suffix) >= self.max_tokens:
                raise ModelLoadError(
                    f"model {folder.name!r}: its prompt and special tokens leave no room for text in "
                    f"{self.max_tokens} tokens"
                )

    @classmethod
    def load(
        cls,
        model: str | ModelFolder,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int | None = None,
        pooling: str | None = None,
        on_long: OnLong = OnLong.TRUNCATE,
        precision: Precision = Precision.FLOAT,
        backend: BackendName = "auto",
        learned: Path | None = None,
        threads: int | None = None,
    ) -> Self:
        """Load a model that is on this machine.

        ``backend`` auto is our own forward pass, or transformers' for an architecture that ours does not know.
        ``learned`` is the folder that keeps what is learned about this machine's memory. ``threads`` are torch's on a
        CPU; None for as many as it had when this process first loaded an engine. Raises UnknownModel,
        ModelLoadError, TokenizerMismatch, DeviceUnavailable or InvalidSetting.
        """
        if batch_tokens is not None and batch_tokens < 1:
            raise InvalidSetting(f"EMBEDDING_BATCH_TOKENS is {batch_tokens}: it must be positive")
        threads = threads or cpu_threads()
        on = resolve_device(device)
        if isinstance(model, str):
            model = resolve_model(model, pooling=pooling, on_long=on_long, precision=precision)
        folder = model
        if Precision(precision) is Precision.INT8 and folder.spec.precision is not Precision.INT8:
            raise InvalidSetting("precision is int8 and the model's folder was read for float: resolve_model takes it")
        config = read_json(folder.transformer / "config.json")
        tokenizer = TextTokenizer.load(folder.transformer, lowercase=folder.lowercase)
        tokens = batch_tokens or default_batch_tokens(on)
        if backend == "onnx" and dtype == "auto":
            dtype = "fp32"  # all that it has
        number_format = resolve_dtype(dtype, on, config.get("model_type", ""))
        head = Head(folder, on)
        pad_id = _pad_id(tokenizer, config)
        loaded: Backend
        if folder.spec.precision is Precision.INT8:
            require_int8(on, backend, number_format)
            build = Build(number_format, on, tokens, folder.spec.max_tokens)
            loaded = load_int8(
                load_model(folder),
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
        budget = Budget(tokens, learned / name if learned is not None else None, least=folder.spec.max_tokens)
        return cls(
            folder,
            tokenizer,
            loaded,
            head,
            budget=budget,
            on_long=on_long,
            threads=threads,
        )

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:<index>``."""
        return str(self._backend.device)

    @property
    def dtype(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``: what the transformer runs in; the rest is fp32.

        ``int8`` where its products do. What is between them runs in bf16 or fp32, as the CPU has it.
        """
        if self.spec.precision is Precision.INT8:
            return "int8"
        return str(self._backend.dtype).removeprefix("torch.")

    @property
    def backend(self) -> str:
        """``native``, ``transformers``, ``onnx`` or ``openvino``."""
        return self._backend.name

    @property
    def batch_tokens(self) -> int:
        """Most tokens of one forward pass; smaller once a pass did not fit the device's memory."""
        return self._budget.tokens

    @property
    def dimensions(self) -> int:
        return self.spec.dimensions

    @property
    def max_tokens(self) -> int:
        return self.spec.max_tokens

    def embed(
        self,
        texts: Sequence[str],
        kind: Kind = "document",
        *,
        on_long: OnLong | None = None,
        urgent: bool = False,
    ) -> Embeddings:
        """All vectors in input order; ``np.asarray`` of the result is the (n, dimensions) float32 matrix.

        Raises EngineError naming the first text that got no vector.
        """
        started = time.perf_counter()
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        n_tokens = np.zeros(len(texts), np.int32)
        truncated = np.zeros(len(texts), np.bool_)
        results = []
        for result in self.stream(texts, kind, on_long=on_long, urgent=urgent):
            if result.failures:
                bad = min(result.failures, key=lambda failure: failure.index)
                raise EngineError(f"text {bad.index} of {len(texts)} got no vector: {bad.code}, {bad.reason}")
            vectors[result.indices] = result.vectors
            n_tokens[result.indices] = result.n_tokens
            truncated[result.indices] = result.truncated
            results.append(result)
        timings = Timings(
            tokenize=sum(result.tokenize_seconds for result in results),
            forward=sum(result.seconds for result in results),
            total=time.perf_counter() - started,
            token_batches=sum(result.tokens > 0 for result in results),
            tokens=sum(result.tokens for result in results),
            padded_tokens=sum(result.padded_tokens for result in results),
        )
        return Embeddings(vectors, n_tokens, truncated, timings)

    def stream(
        self,
        texts: Sequence[str],
        kind: Kind = "document",
        *,
        on_long: OnLong | None = None,
        stop: Callable[[], bool] | None = None,
        urgent: bool = False,
    ) -> Iterator[TokenBatchResult]:
        """One result per TokenBatch that held texts of this call; every text is in one result, once.

        ``stop`` is asked before each result: when it says True the stream ends there with what is under way, and
        what was not yielded was not embedded. ``urgent`` callers go before the others. Raises EngineError only where
        the model cannot run at all; a text that fails is in ``failures`` and its neighbours go on.
        """
        prompt = self.spec.query_prompt if kind == "query" else self.spec.document_prompt
        frame = self._tokenizer.frame(prompt)
        # What a model without include_prompt leaves out of its pooling; without a prompt, nothing.
        skip = frame.skip if prompt else 0
        pieces: list[_Piece] = []
        name = self._loop.open(urgent=urgent)
        try:
            for first, end in _tokenizer_calls(texts):
                if stop is not None and stop():
                    break
                started = time.perf_counter()
                with self._tokenizing.step():
                    tokenized = self._tokenizer.encode(texts[first:end], prompt)
                    rows = make_rows(tokenized, self.max_tokens, frame, on_long or self.on_long)
                piece = _Piece(first, pieces[-1].end if pieces else 0, rows, Collector(rows, self._head.finish))
                pieces.append(piece)
                self._loop.add(name, rows.ids, rows.windows[rows.owner] > 1, skip)
                seconds = time.perf_counter() - started
                yield self._result(piece, failures=rows.failures, tokenize_seconds=seconds)
            for done in self._loop.results(name):
                yield from self._take(pieces, done)
                if stop is not None and stop():
                    break
            for done in self._loop.close(name):
                yield from self._take(pieces, done)
        finally:
            self._loop.close(name)

    def _take(self, pieces: Sequence[_Piece], done: Done) -> Iterator[TokenBatchResult]:
        """The results of the pieces that had rows in one TokenBatch."""
        for piece in pieces:
            mine = np.flatnonzero((done.at >= piece.row) & (done.at < piece.end))
            if not len(mine):
                continue
            part = done.outcome.part(mine)
            rows = done.at[mine] - piece.row
            indices, vectors, failures = piece.collector.add(rows, part)
            tokens = sum(len(piece.rows.ids[row]) for row in rows)
            share = tokens / done.tokens
            yield TokenBatchResult(
                indices=indices + np.int32(piece.first),
                vectors=vectors,
                n_tokens=piece.rows.n_tokens[indices],
                truncated=piece.rows.truncated[indices],
                failures=_shifted(failures, piece.first),
                seconds=done.seconds * share,
                under_way=done.under_way,
                tokens=tokens,
                padded_tokens=round(done.padded_tokens * share),
            )

    def _result(self, piece: _Piece, *, failures: tuple[TextFailure, ...], tokenize_seconds: float) -> TokenBatchResult:
        """What tokenizing a piece found: texts that never reach the model."""
        return TokenBatchResult(
            indices=np.empty(0, np.int32),
            vectors=np.empty((0, self.dimensions), np.float32),
            n_tokens=np.empty(0, np.int32),
            truncated=np.empty(0, np.bool_),
            failures=_shifted(failures, piece.first),
            seconds=0.0,
            tokenize_seconds=tokenize_seconds,
        )

    def _load_exact(self) -> Backend:
        """The same weights in fp32 and without shortcuts, for texts whose vector was not finite.

        In int8 the products stay what they are: an fp32 vector does not belong into an int8 space.
        """
        with self._exact_loading:
            if self._exact is None and isinstance(self._backend, Int8Backend):
                self._exact = self._backend.careful_twin()
            if self._exact is None:
                logger.warning(
                    "a vector of %s is not finite in %s: loading the model in fp32 beside it for such texts",
                    self.spec.model,
                    self.dtype,
                )
                self._exact = _load_backend(
                    self._folder,
                    "auto",
                    device=self._backend.device,
                    dtype=torch.float32,
                    slots=64,
                    threads=cpu_threads(),
                    pad_id=_pad_id(self._tokenizer, read_json(self._folder.transformer / "config.json")),
                )
                for each in (self._exact, self._backend):
                    if isinstance(each, NativeBackend):
                        each.careful = True
            return self._exact


@dataclass(frozen=True, slots=True)
class _Piece:
    """Texts that were tokenized in one call."""

    first: int
    """The index of its first text."""
    row: int
    """The stream's number of its first row."""
    rows: Rows
    collector: Collector

    @property
    def end(self) -> int:
        return self.row + len(self.rows.ids)


def _tokenizer_calls(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """First and end of the texts of each call; a text that is too long for its share has one to itself."""
    first = characters = 0
    for at, text in enumerate(texts):
        if at > first and (at - first == _TOKENIZER_CALL or characters + len(text) > _TOKENIZER_CHARACTERS):
            yield first, at
            first, characters = at, 0
        characters += len(text)
    if texts:
        yield first, len(texts)


def _shifted(failures: tuple[TextFailure, ...], first: int) -> tuple[TextFailure, ...]:
    return tuple(replace(failure, index=failure.index + first) for failure in failures)


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
    if name in ("onnx", "openvino"):
        if device.type != "cpu":
            raise InvalidSetting(f"backend {name} runs on the CPU: set EMBEDDING_DEVICE=cpu, or EMBEDDING_BACKEND=auto")
        exported = OnnxBackend if name == "onnx" else OpenVinoBackend
        return exported.load(folder, dtype=dtype, threads=threads, pad_id=pad_id)
    model = load_model(folder)
    try:
        if name != "transformers":
            build = Build(dtype, device, slots, folder.spec.max_tokens)
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
