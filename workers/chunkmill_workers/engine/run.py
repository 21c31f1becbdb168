"""One TokenBatch through the model, so that a bad text costs itself and not its neighbours."""

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

# CUDA's messages run over pages; a reason goes into the dead list's table.
_REASON_LENGTH = 500


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows that go through the model together."""

    rows: Sequence[Ids]
    """(length,) int32 each, special tokens included."""
    windows: NDArray[np.bool_]
    """(n,) bool: rows that are windows of a split text; their vectors stay as they are before the last Normalize."""
    skips: NDArray[np.int32]
    """(n,) int32: leading tokens that a model without ``include_prompt`` does not pool."""

    def take(self, at: NDArray[np.intp]) -> TokenBatch:
        return TokenBatch([self.rows[position] for position in at], self.windows[at], self.skips[at])

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)


@dataclass(slots=True)
class Outcome:
    """``vectors`` is (n, dimensions) float32; a row in ``failures`` (position → code, reason) has none."""

    vectors: NDArray[np.float32]
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    too_big: int | None = None
    """Tokens of the smallest pass that did not fit the device's memory."""

    def part(self, at: NDArray[np.intp]) -> Outcome:
        """Some of its rows, in the order of ``at``."""
        if not self.failures:
            return Outcome(self.vectors[at])
        places = {int(position): place for place, position in enumerate(at)}
        return Outcome(self.vectors[at], {places[row]: why for row, why in self.failures.items() if row in places})


@dataclass(slots=True)
class Pass:
    """A TokenBatch under way on the device."""

    batch: TokenBatch
    vectors: torch.Tensor | None = None
    """(n, dimensions) float32 in host memory, once ``done`` says so."""
    done: torch.cuda.Event | None = None
    failed: str | None = None
    """Why it could not be started; ``out_of_memory`` with it."""
    out_of_memory: bool = False


class Runner:
    """Backend and head together. One thread at a time.

    ``exact`` gives the same model in fp32, without shortcuts; it is asked when a vector is not finite. ``shrink`` is
    told how many tokens did not fit the device's memory.
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
    ) -> None:
        self.backend = backend
        self._head = head
        self._probe = TokenBatch([probe], np.zeros(1, np.bool_), np.zeros(1, np.int32))
        self._dimensions = dimensions
        self._exact = exact
        self._shrink = shrink
        self._copies = _stream(backend.device)

    def launch(self, batch: TokenBatch) -> Pass:
        """Start a pass. On a GPU it returns before the device is done; it never raises."""
        started = Pass(batch)
        try:
            self._start(started, self.backend)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is one text's fault, or the device's
            _note(started, error)
        # Out of the except block: its traceback keeps the failed pass's tensors, and their memory, alive.
        return started

    def finish(self, started: Pass) -> Outcome:
        """Wait for a pass; mend what went wrong in it.

        A pass that raised is halved down to the texts that fail alone; a vector that is not finite is computed
        once more in fp32. Raises DeviceFailed where even a known good text fails: then the device is at fault and
        no text may be blamed.
        """
        batch = started.batch
        outcome = Outcome(np.zeros((len(batch.rows), self._dimensions), np.float32))
        self._settle(started, np.arange(len(batch.rows)), self.backend, outcome)
        if outcome.too_big is not None and not any(code == "out_of_memory" for code, _ in outcome.failures.values()):
            # In smaller passes all of it fitted. A text that does not fit alone says nothing about the others.
            self._shrink(outcome.too_big)
        bad = np.flatnonzero(~np.isfinite(outcome.vectors).all(axis=1))
        if len(bad):
            self._mend(batch, bad, outcome)
        return outcome

    def __call__(self, batch: TokenBatch) -> Outcome:
        """Both at once."""
        return self.finish(self.launch(batch))

    def _start(self, started: Pass, backend: Backend) -> None:
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

    def _settle(self, started: Pass, at: NDArray[np.intp], backend: Backend, outcome: Outcome) -> None:
        """Write a pass's vectors to ``outcome`` at ``at``; halve it where it failed."""
        batch = started.batch
        if started.failed is None:
            try:
                if started.done is not None:
                    started.done.synchronize()
                assert started.vectors is not None  # noqa: S101 - started and not failed
                outcome.vectors[at] = started.vectors.numpy()
            except Exception as error:  # noqa: BLE001 - a kernel's error comes out here, of whatever kind it is
                _note(started, error)
            else:
                return
        assert started.failed is not None  # noqa: S101
        started.vectors = None
        if started.out_of_memory:
            outcome.too_big = min(batch.tokens, outcome.too_big or batch.tokens)
            if backend.device.type == "cuda":
                torch.cuda.empty_cache()  # what is cached may lie in pieces that are too small
        if len(at) == 1:
            self._check_device(started.failed, backend)
            code = "out_of_memory" if started.out_of_memory else "forward_failed"
            size = f" (alone in its forward pass, {batch.tokens} tokens)" if started.out_of_memory else ""
            outcome.failures[int(at[0])] = (code, started.failed + size)
            return
        half = len(at) // 2
        for part in (np.arange(half), np.arange(half, len(at))):
            again = Pass(batch.take(part))
            try:
                self._start(again, backend)
            except Exception as error:  # noqa: BLE001 - see launch
                _note(again, error)
            self._settle(again, at[part], backend, outcome)

    def _check_device(self, reason: str, backend: Backend) -> None:
        """A broken device fails every text; without this look, a whole job would end in its dead list."""
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

    def _mend(self, batch: TokenBatch, bad: NDArray[np.intp], outcome: Outcome) -> None:
        for position in bad:  # a row that failed has zeros, which are finite
            try:
                exact = self._exact()
            except Exception as error:  # noqa: BLE001 - it may not fit beside the model
                reason = f"the model's vector for this text is not finite, and it cannot be loaded in fp32: {error}"
                outcome.failures[int(position)] = ("not_finite", reason[:_REASON_LENGTH])
                continue
            again = Pass(batch.take(np.array([position])))
            try:
                self._start(again, exact)
            except Exception as error:  # noqa: BLE001 - see launch
                _note(again, error)
            self._settle(again, np.array([position]), exact, outcome)
            if not np.isfinite(outcome.vectors[position]).all():
                outcome.failures.setdefault(
                    int(position), ("not_finite", "the model's vector for this text is not finite, in fp32 too")
                )


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _note(failed: Pass, error: Exception) -> None:
    failed.failed = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
    failed.out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )


# The CPU's allocator, cuBLAS and oneDNN have no error class of their own for it, nor has CUDA where it is not torch's
# allocator that asks: for pinned memory, or a kernel's code.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
