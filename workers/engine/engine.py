"""The engine: text in, vectors out. It knows no database and no broker, and returns its timings.

tokenizer → windows (policy for long texts) → packing → forward → pooling, each in a file of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import numpy as np

from app.domain.spaces import OnLong, SpaceSpec
from app.errors import EngineError, InvalidSetting, ModelLoadError
from app.models import ModelFolder, resolve_model
from app.models.files import read_json
from workers.engine.collect import Collector
from workers.engine.forward import Backbone
from workers.engine.packing import pack
from workers.engine.pooling import Head
from workers.engine.precision import default_batch_tokens, resolve_device, resolve_dtype
from workers.engine.results import Embeddings, TextFailure, Timings, TokenBatchResult
from workers.engine.run import Runner
from workers.engine.tokenizer import TextTokenizer
from workers.engine.turns import Turns
from workers.engine.windows import Ids, make_rows

Kind = Literal["document", "query"]

# Texts per call of the Rust tokenizer: enough to keep its threads busy, few enough that `stop` is heard.
_TOKENIZER_CALL = 1_024


class Engine:
    """One model on one device, shared by the threads of a worker."""

    def __init__(
        self,
        folder: ModelFolder,
        tokenizer: TextTokenizer,
        backbone: Backbone,
        head: Head,
        *,
        batch_tokens: int,
        on_long: OnLong,
    ) -> None:
        self.spec: SpaceSpec = folder.spec
        self.batch_tokens = batch_tokens
        self.on_long = on_long
        self._tokenizer = tokenizer
        self._backbone = backbone
        self._head = head
        self._runner = Runner(backbone, head, probe=tokenizer.probe, dimensions=self.dimensions)
        self._turns = Turns()
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
    ) -> Self:
        """Load a model that is on this machine.

        Raises UnknownModel, ModelLoadError, TokenizerMismatch, DeviceUnavailable or InvalidSetting.
        """
        if batch_tokens is not None and batch_tokens < 1:
            raise InvalidSetting(f"EMBEDDING_BATCH_TOKENS is {batch_tokens}: it must be positive")
        on = resolve_device(device)
        folder = resolve_model(model, pooling=pooling, on_long=on_long) if isinstance(model, str) else model
        config = read_json(folder.transformer / "config.json")
        tokenizer = TextTokenizer.load(folder.transformer, lowercase=folder.lowercase)
        pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else config.get("pad_token_id") or 0
        backbone = Backbone.load(
            folder.transformer,
            device=on,
            dtype=resolve_dtype(dtype, on, config.get("model_type", "")),
            pad_id=pad_id,
        )
        tokenizer.check(config, backbone.embedding_rows)
        tokens = batch_tokens or default_batch_tokens(on)
        return cls(folder, tokenizer, backbone, Head(folder, on), batch_tokens=tokens, on_long=on_long)

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:<index>``."""
        return str(self._backbone.device)

    @property
    def dtype(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``: what the transformer runs in; the rest is fp32."""
        return str(self._backbone.dtype).removeprefix("torch.")

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
        """One result per TokenBatch, as soon as it is done; every text is in one result, once.

        ``stop`` is asked before each TokenBatch: when it says True the stream ends there, and what was not
        yielded was not embedded. ``urgent`` callers go before the others. Raises EngineError only where
        the model cannot run at all; a text that fails is in ``failures`` and its neighbours go on.
        """
        started = time.perf_counter()
        prompt = self.spec.query_prompt if kind == "query" else self.spec.document_prompt
        frame = self._tokenizer.frame(prompt)
        tokenized: list[Ids | TextFailure] = []
        for first in range(0, len(texts), _TOKENIZER_CALL):
            if stop is not None and stop():
                return
            # Outside the turn: it overlaps with another thread's forward pass.
            tokenized += self._tokenizer.encode(texts[first : first + _TOKENIZER_CALL], prompt, first=first)
        # What a model without include_prompt leaves out of its pooling; without a prompt, nothing.
        skip = frame.skip if prompt else 0
        rows = make_rows(tokenized, self.max_tokens, frame, on_long or self.on_long)
        lengths = np.array([len(ids) for ids in rows.ids], np.int32)
        batches = pack(lengths, self.batch_tokens)
        tokenize_seconds = time.perf_counter() - started
        if rows.failures:
            yield _rejected(rows.failures, self.dimensions, tokenize_seconds)
            tokenize_seconds = 0.0
        collector = Collector(rows, self._head.finish)
        for batch in batches:
            if stop is not None and stop():
                return
            ids = [rows.ids[row] for row in batch]
            windows = rows.windows[rows.owner[batch]] > 1
            with self._turns.turn(urgent=urgent):
                started = time.perf_counter()
                outcome = self._runner(ids, windows=windows, skip=skip)
                seconds = time.perf_counter() - started
            indices, vectors, failures = collector.add(batch, outcome)
            yield TokenBatchResult(
                indices=indices,
                vectors=vectors,
                n_tokens=rows.n_tokens[indices],
                truncated=rows.truncated[indices],
                failures=failures,
                seconds=seconds,
                tokens=int(lengths[batch].sum()),
                padded_tokens=int(lengths[batch].max()) * len(batch),
                tokenize_seconds=tokenize_seconds,
            )
            tokenize_seconds = 0.0


def _rejected(failures: tuple[TextFailure, ...], dimensions: int, seconds: float) -> TokenBatchResult:
    """The texts that never reach the model."""
    return TokenBatchResult(
        indices=np.empty(0, np.int32),
        vectors=np.empty((0, dimensions), np.float32),
        n_tokens=np.empty(0, np.int32),
        truncated=np.empty(0, np.bool_),
        failures=failures,
        seconds=0.0,
        tokenize_seconds=seconds,
    )
