"""The engine: text in, vectors out. It knows no database and no broker, and returns its timings.

A text passes through tokenizer → windows (policy for long texts) → loop (packing) → run → backend → pooling → collect.
Each of these is a file of its own; load makes the parts.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch

from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec
from chunkmill.errors import EngineError, ModelLoadError
from chunkmill.models import ModelFolder
from chunkmill_workers.engine.backends.int8 import Int8Backend
from chunkmill_workers.engine.collect import Collector
from chunkmill_workers.engine.load import BackendName, EngineParts, ExactTwin, load_parts
from chunkmill_workers.engine.long_texts import give_back_memory
from chunkmill_workers.engine.loop import DeviceLoop, StreamResult
from chunkmill_workers.engine.probe import MEMORY, UnfitModel, require_fit
from chunkmill_workers.engine.results import Embeddings, TextFailure, Timings, TokenBatchResult
from chunkmill_workers.engine.run import Runner
from chunkmill_workers.engine.steps import StepClock
from chunkmill_workers.engine.windows import Rows, make_rows

logger = logging.getLogger(__name__)

Kind = Literal["document", "query"]

# Texts per call of the Rust tokenizer: enough to keep its threads busy, few enough that `stop` is asked often. A call
# is also limited to the characters for which the tokenizer needs about 200 MB, and a second or two.
_TOKENIZER_CALL = 1_024
_TOKENIZER_CHARACTERS = 1_000_000


class Engine:
    """One model on one device, shared by the threads of a worker."""

    def __init__(self, parts: EngineParts, *, on_long: OnLong) -> None:
        """Make one with :meth:`load`. Raises ModelLoadError if the prompts leave no room for text."""
        folder, tokenizer = parts.folder, parts.tokenizer
        self.spec: SpaceSpec = folder.spec
        self.on_long = on_long
        self._tokenizer = tokenizer
        self._backend = parts.backend
        self._head = parts.head
        self._token_limit = parts.token_limit
        self._exact = ExactTwin(parts)
        self._runner = Runner(
            parts.backend,
            parts.head,
            probe=tokenizer.probe,
            dimensions=self.dimensions,
            exact=self._exact,
            shrink=parts.token_limit.shrink,
            fitted=parts.token_limit.fitted,
        )
        self._loop = DeviceLoop(self._runner, parts.token_limit, threads=parts.threads)
        self._tokenizing = StepClock()
        self.steps = {"a forward pass": self._loop.passes, "a call of the tokenizer": self._tokenizing}
        """The steps that may hang, by the names under which a watchdog reports them."""
        self._queries = None if parts.query is None else type(self)(parts.query, on_long=on_long)
        """Another engine, if the vectors of queries are made by another model or other modules."""
        if self._queries is not None:
            self.steps |= {f"{step} for queries": clock for step, clock in self._queries.steps.items()}
        for prompt in (folder.spec.document_prompt, "" if self._queries else folder.spec.query_prompt):
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
        """An engine with a model that is on this machine.

        ``batch_tokens`` is the most tokens of one forward pass; None takes the device's default. ``backend`` auto is
        our own forward pass, or that of transformers for an architecture that ours does not know. ``learned`` is the
        folder for what is learned about this machine's memory; None keeps it in this process. ``threads`` are torch's
        on a CPU; None takes as many as torch had when this process first loaded an engine.

        The model has to embed a short text before it is returned, once in each process: see
        `chunkmill_workers.engine.probe`. With ``dtype`` auto, a model that cannot do so in half precision is loaded in
        fp32, and a warning says so.

        Raises UnknownModel, ModelLoadError, TokenizerMismatch, DeviceUnavailable or InvalidSetting.
        """
        load = partial(
            load_parts,
            model,
            device=device,
            batch_tokens=batch_tokens,
            pooling=pooling,
            on_long=on_long,
            precision=precision,
            backend=backend,
            learned=learned,
            threads=threads,
        )
        parts = load(dtype=dtype)
        engine = cls(parts, on_long=on_long)
        try:
            engine._require_fit(parts, chosen=dtype != "auto")
        except UnfitModel as unfit:
            if dtype != "auto" or parts.backend.dtype == torch.float32 or isinstance(parts.backend, Int8Backend):
                raise
            logger.warning("%s. It is loaded in fp32 instead", unfit)
            for side in (parts, parts.query):
                if side is not None:
                    MEMORY.failed_in_half(side.folder, side.backend.device)
        else:
            return engine
        on = engine.device
        del engine, parts  # their memory is needed for the second model
        free_memory(on)
        parts = load(dtype="fp32")
        engine = cls(parts, on_long=on_long)
        engine._require_fit(parts, chosen=True)
        return engine

    def _require_fit(self, parts: EngineParts, *, chosen: bool) -> None:
        require_fit(parts.folder, parts.tokenizer, parts.backend, self._runner, chosen=chosen)
        if self._queries is not None and parts.query is not None:
            self._queries._require_fit(parts.query, chosen=chosen)

    def close(self, seconds: float = 30.0) -> None:
        """Let go of the model: whoever drops the last reference to a closed engine frees its memory at once.

        Without it an idle device thread holds the model for 10 s. Calls that are running go on, and are waited for
        ``seconds`` at most; those that come later still work.
        """
        self._loop.stop(seconds)
        if self._queries is not None:
            self._queries.close(seconds)

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:<index>``."""
        return str(self._backend.device)

    @property
    def dtype(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``: the number format of the transformer; the head runs in fp32.

        ``int8`` if the matrix products run in int8. The operations between them run in bf16 if the CPU has it, else in
        fp32.
        """
        if self.spec.precision is Precision.INT8:
            return "int8"
        return str(self._backend.dtype).removeprefix("torch.")

    @property
    def backend(self) -> str:
        """``native``, ``transformers``, ``onnx``, ``openvino`` or ``static``."""
        return self._backend.name

    @property
    def batch_tokens(self) -> int:
        """The most tokens of one forward pass. It shrinks after a pass that did not fit the memory, and rises again."""
        return self._token_limit.tokens

    @property
    def has_own_queries(self) -> bool:
        """Whether queries are embedded by another model, or by other modules, than documents."""
        return self._queries is not None

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        return self.spec.dimensions

    @property
    def max_tokens(self) -> int:
        """The most tokens that the model reads, special tokens and prompt included."""
        return self.spec.max_tokens

    def embed(
        self,
        texts: Sequence[str],
        kind: Kind = "document",
        *,
        on_long: OnLong | None = None,
        urgent: bool = False,
    ) -> Embeddings:
        """The vectors of all ``texts``, in input order; ``np.asarray`` of the result is (n, dimensions) float32.

        Arguments are those of :meth:`stream`. Raises EngineError, which names the first text that got no vector.
        """
        started = time.perf_counter()
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        n_tokens = np.zeros(len(texts), np.int32)
        truncated = np.zeros(len(texts), np.bool_)
        results = []
        for result in self.stream(texts, kind, on_long=on_long, urgent=urgent):
            if result.failures:
                first = min(result.failures, key=lambda failure: failure.index)
                raise EngineError(f"text {first.index} of {len(texts)} got no vector: {first.code}, {first.reason}")
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
        large: bool = False,
    ) -> Iterator[TokenBatchResult]:
        """The results of every TokenBatch that held texts of this call. Each text is in exactly one result.

        ``kind`` chooses the model's prompt. ``on_long`` overrides the engine's policy for long texts. ``stop`` is asked
        before each result: once it returns True, the passes that are running end and are yielded, and the texts that
        are not in any result were not embedded. ``urgent`` calls are served before the others, and of these the
        ``large`` ones last.

        A text that fails is in ``failures`` and does not stop the others. Raises EngineError only if the model cannot
        run at all.
        """
        if kind == "query" and self._queries is not None:
            yield from self._queries.stream(
                texts, kind, on_long=on_long or self.on_long, stop=stop, urgent=urgent, large=large
            )
            return
        prompt = self.spec.query_prompt if kind == "query" else self.spec.document_prompt
        policy = on_long or self.on_long
        frame = self._tokenizer.frame(prompt)
        # The leading tokens that a model without include_prompt leaves out of its pooling; none without a prompt.
        skip = frame.skip if prompt else 0
        pieces: list[_Piece] = []
        name = self._loop.open(urgent=urgent, large=large)
        try:
            for first, end in _tokenizer_calls(texts):
                if stop is not None and stop():
                    break
                started = time.perf_counter()
                with self._tokenizing.step():
                    limit = None if policy is OnLong.SPLIT else self.max_tokens
                    tokenized = self._tokenizer.encode(texts[first:end], prompt, limit=limit)
                    rows = make_rows(tokenized, self.max_tokens, frame, policy)
                piece = _Piece(first, pieces[-1].end if pieces else 0, rows, Collector(rows, self._head.finish))
                pieces.append(piece)
                self._loop.add(name, rows.ids, rows.windows[rows.owner] > 1, skip)
                seconds = time.perf_counter() - started
                yield self._result(piece, failures=rows.failures, tokenize_seconds=seconds)
            for finished in self._loop.results(name):
                yield from self._take(pieces, finished)
                if stop is not None and stop():
                    break
            for finished in self._loop.close(name):
                yield from self._take(pieces, finished)
        finally:
            self._loop.close(name)

    def _take(self, pieces: Sequence[_Piece], finished: StreamResult) -> Iterator[TokenBatchResult]:
        """The result of each piece that had rows in one TokenBatch."""
        for piece in pieces:
            mine = np.flatnonzero((finished.at >= piece.row) & (finished.at < piece.end))
            if not len(mine):
                continue
            part = finished.rows.part(mine)
            rows = finished.at[mine] - piece.row
            indices, vectors, failures = piece.collector.add(rows, part)
            tokens = sum(len(piece.rows.ids[row]) for row in rows)
            share = tokens / finished.tokens
            yield TokenBatchResult(
                indices=indices + np.int32(piece.first),
                vectors=vectors,
                n_tokens=piece.rows.n_tokens[indices],
                truncated=piece.rows.truncated[indices],
                failures=_shifted(failures, piece.first),
                seconds=finished.seconds * share,
                under_way=finished.under_way,
                tokens=tokens,
                padded_tokens=round(finished.padded_tokens * share),
            )

    def _result(self, piece: _Piece, *, failures: tuple[TextFailure, ...], tokenize_seconds: float) -> TokenBatchResult:
        """The result of tokenizing a piece: it has no vectors, only texts that never reach the model."""
        return TokenBatchResult(
            indices=np.empty(0, np.int32),
            vectors=np.empty((0, self.dimensions), np.float32),
            n_tokens=np.empty(0, np.int32),
            truncated=np.empty(0, np.bool_),
            failures=_shifted(failures, piece.first),
            seconds=0.0,
            tokenize_seconds=tokenize_seconds,
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """The texts of one call of the tokenizer."""

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
    """The (first, end) positions of the texts of each call. A text that exceeds the limit has a call to itself."""
    first = characters = 0
    for at, text in enumerate(texts):
        if at > first and (at - first == _TOKENIZER_CALL or characters + len(text) > _TOKENIZER_CHARACTERS):
            yield first, at
            first, characters = at, 0
        characters += len(text)
    if texts:
        yield first, len(texts)


def free_memory(device: str) -> None:
    """Return to the system what engines that were dropped have held. ``device`` is ``cpu`` or ``cuda:<index>``."""
    gc.collect()  # a model's modules refer to each other
    if device != "cpu":
        torch.cuda.empty_cache()
    give_back_memory()


def _shifted(failures: tuple[TextFailure, ...], first: int) -> tuple[TextFailure, ...]:
    return tuple(replace(failure, index=failure.index + first) for failure in failures)
