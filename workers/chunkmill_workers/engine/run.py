"""Runs one TokenBatch through the model in such a way that a bad text fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.errors import DeviceFailed
from chunkmill_workers.engine.backends import Backend
from chunkmill_workers.engine.encoder.layout import to_device
from chunkmill_workers.engine.pooling import Head
from chunkmill_workers.engine.windows import Ids

# Characters of a reason, which goes into the table of dead chunks. CUDA's messages are pages long.
_REASON_LENGTH = 500


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows that go through the model together."""

    rows: Sequence[Ids]
    """(length,) int32 each, special tokens included."""
    windows: NDArray[np.bool_]
    """(n,) bool: rows that are windows of a split text. The last Normalize is left out for their vectors."""
    skips: NDArray[np.int32]
    """(n,) int32: how many leading tokens a model without ``include_prompt`` leaves out of its pooling."""

    def take(self, at: NDArray[np.intp]) -> TokenBatch:
        """A TokenBatch of the rows at the positions ``at``, in that order."""
        return TokenBatch([self.rows[position] for position in at], self.windows[at], self.skips[at])

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row) for row in self.rows)


@dataclass(slots=True)
class PassResult:
    """What a pass made of each row of its TokenBatch."""

    vectors: NDArray[np.float32]
    """(n, dimensions) float32; zeros for a row in ``failures``."""
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    """The position of each row that got no vector, with a code and a reason."""
    too_big: int | None = None
    """Tokens of the largest pass that did not fit the device's memory; None if all fitted."""

    def part(self, at: NDArray[np.intp]) -> PassResult:
        """The rows at the positions ``at``, in that order."""
        if not self.failures:
            return PassResult(self.vectors[at])
        places = {int(position): place for place, position in enumerate(at)}
        return PassResult(self.vectors[at], {places[row]: why for row, why in self.failures.items() if row in places})


@dataclass(slots=True)
class Pass:
    """A TokenBatch that runs on the device, or that could not be started."""

    batch: TokenBatch
    vectors: torch.Tensor | None = None
    """(n, dimensions) float32 in host memory. On a GPU they are complete once ``done`` has happened."""
    done: torch.cuda.Event | None = None
    failed: str | None = None
    """Why the pass failed; None if it did not."""
    out_of_memory: bool = False
    """The reason is that the device's memory was full."""


class Runner:
    """Runs TokenBatches through backend and head. Only one thread may call it, unless the backend is ``concurrent``.

    ``exact`` returns the same model in fp32, without shortcuts; it is called when a vector is not finite. ``shrink`` is
    called with the tokens of a pass that did not fit the device's memory, and ``fitted`` with those of one that did.
    """

    def __init__(
        self,
        backend: Backend,
        head: Head,
        *,
        probe: Ids,
        dimensions: int,
        exact: Callable[[], Backend],
        shrink: Callable[[int], object] = lambda tokens: None,
        fitted: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        self.backend = backend
        self._head = head
        self._probe = TokenBatch([probe], np.zeros(1, np.bool_), np.zeros(1, np.int32))
        self._dimensions = dimensions
        self._exact = exact
        self._shrink = shrink
        self._fitted = fitted
        self._copies = _stream(backend.device)

    def launch(self, batch: TokenBatch) -> Pass:
        """Start a pass. On a GPU it returns before the pass is finished. It does not raise: `finish` handles errors."""
        started = Pass(batch)
        try:
            self._start(started, self.backend)
        except Exception as error:  # noqa: BLE001 - the cause may be one text or the device
            _note(started, error)
        # Return after the except block, because the traceback of an error keeps the failed pass's tensors and their
        # memory alive.
        return started

    def finish(self, started: Pass) -> PassResult:
        """Wait for a pass and return its result, with as few failed rows as possible.

        A pass that raised is run again in halves, down to the rows that fail alone. A vector that is not finite is
        computed once more in fp32. Raises DeviceFailed if even a known good text fails, because then the device is at
        fault and no text.
        """
        batch = started.batch
        result = PassResult(np.zeros((len(batch.rows), self._dimensions), np.float32))
        self._settle(started, np.arange(len(batch.rows)), self.backend, result)
        if result.too_big is not None and not any(code == "out_of_memory" for code, _ in result.failures.values()):
            # All rows fitted in smaller passes. A text that does not fit alone says nothing about the others, so after
            # such a failure the token limit stays as it is.
            self._shrink(result.too_big)
        elif result.too_big is None and not result.failures:
            self._fitted(batch.tokens)
        bad = np.flatnonzero(~np.isfinite(result.vectors).all(axis=1))
        if len(bad):
            self._repeat_exactly(batch, bad, result)
        return result

    def __call__(self, batch: TokenBatch) -> PassResult:
        """Start a pass and wait for its result."""
        return self.finish(self.launch(batch))

    def attempt(self, batch: TokenBatch) -> NDArray[np.float32]:
        """The vectors of one pass as they come, (n, width) float32. Raises what the model raises.

        Nothing is run again, and the width is the model's own: this is for testing the model, not for texts.
        """
        started = Pass(batch)
        self._start(started, self.backend)
        if started.done is not None:
            started.done.synchronize()
        assert started.vectors is not None  # noqa: S101 - _start has set it
        vectors: NDArray[np.float32] = started.vectors.numpy()
        return vectors

    def _start(self, started: Pass, backend: Backend) -> None:
        """Set the pass's ``vectors``, and on a GPU ``done``. Raises what the model raises."""
        batch = started.batch
        with torch.inference_mode():
            only = self._head.only([len(row) for row in batch.rows], batch.skips)
            vectors = self._head(backend(batch.rows, only=only), skips=batch.skips)
            final = self._head.finish(vectors)
            if batch.windows.any():
                final = torch.where(to_device(batch.windows, final.device)[:, None], vectors, final)
            if self._copies is None or final.device.type != "cuda":
                started.vectors = final.cpu()
                return
            host = torch.empty(final.shape, dtype=final.dtype, pin_memory=True)
            self._copies.wait_stream(torch.cuda.current_stream(final.device))
            with torch.cuda.stream(self._copies):
                host.copy_(final, non_blocking=True)
                final.record_stream(self._copies)
                started.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                started.done.record(self._copies)
            started.vectors = host

    def _settle(self, started: Pass, at: NDArray[np.intp], backend: Backend, result: PassResult) -> None:
        """Write a pass's vectors into ``result`` at the positions ``at``. A pass that failed is run again in halves."""
        batch = started.batch
        if started.failed is None:
            try:
                if started.done is not None:
                    started.done.synchronize()
                assert started.vectors is not None  # noqa: S101 - started and not failed
                result.vectors[at] = started.vectors.numpy()
            except Exception as error:  # noqa: BLE001 - errors of kernels, of any class, come out here
                _note(started, error)
            else:
                return
        assert started.failed is not None  # noqa: S101
        started.vectors = None
        if started.out_of_memory:
            result.too_big = max(batch.tokens, result.too_big or 0)
            if backend.device.type == "cuda":
                torch.cuda.empty_cache()  # the cached blocks may all be too small
        if len(at) == 1:
            self._check_device(started.failed, backend)
            code = "out_of_memory" if started.out_of_memory else "forward_failed"
            size = f" (alone in its forward pass, {batch.tokens} tokens)" if started.out_of_memory else ""
            result.failures[int(at[0])] = (code, started.failed + size)
            return
        half = len(at) // 2
        for part in (np.arange(half), np.arange(half, len(at))):
            again = Pass(batch.take(part))
            try:
                self._start(again, backend)
            except Exception as error:  # noqa: BLE001 - see launch
                _note(again, error)
            self._settle(again, at[part], backend, result)

    def _check_device(self, reason: str, backend: Backend) -> None:
        """Raise DeviceFailed unless a known good text runs.

        A broken device fails every text, and without this check a whole job would end on its dead list.
        """
        try:
            probe = Pass(self._probe)
            self._start(probe, backend)
            if probe.done is not None:
                probe.done.synchronize()
        except Exception as error:
            raise DeviceFailed(
                f"the model no longer runs on {backend.device}: {reason}. Restart the worker; if it "
                "happens again, lower EMBEDDING_BATCH_TOKENS or check the device"
            ) from error

    def _repeat_exactly(self, batch: TokenBatch, bad: NDArray[np.intp], result: PassResult) -> None:
        """Compute the rows at the positions ``bad`` once more in fp32, and note those that fail again."""
        for position in bad:  # rows that failed are not among them: their vectors are zeros, which are finite
            try:
                exact = self._exact()
            except Exception as error:  # noqa: BLE001 - it may not fit beside the model
                reason = (
                    f"the model's vector for this text is not finite, and the model cannot be loaded in fp32: {error}"
                )
                result.failures[int(position)] = ("not_finite", reason[:_REASON_LENGTH])
                continue
            again = Pass(batch.take(np.array([position])))
            try:
                self._start(again, exact)
            except Exception as error:  # noqa: BLE001 - see launch
                _note(again, error)
            self._settle(again, np.array([position]), exact, result)
            if not np.isfinite(result.vectors[position]).all():
                result.failures.setdefault(
                    int(position), ("not_finite", "the model's vector for this text is not finite, in fp32 too")
                )


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _note(failed: Pass, error: Exception) -> None:
    """Write to ``failed`` why it failed."""
    failed.failed = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
    failed.out_of_memory = is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that the memory of the machine or of the device is full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )


# The CPU's allocator, cuBLAS and oneDNN have no error class of their own for a lack of memory. Nor has CUDA for memory
# that torch's allocator does not ask for: pinned memory, and the code of kernels.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
