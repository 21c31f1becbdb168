"""One TokenBatch through the model, so that a bad text costs itself and not its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import EngineError
from workers.engine.forward import Backbone
from workers.engine.pooling import Head
from workers.engine.windows import Ids

# CUDA's messages run over pages; a reason goes into the dead list's table.
_REASON_LENGTH = 500


@dataclass(slots=True)
class Outcome:
    """``vectors`` is (m, dimensions) float32; a row in ``failures`` (position → code, reason) has none."""

    vectors: NDArray[np.float32]
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)


class Runner:
    """Backbone and head together. The caller holds the device."""

    def __init__(self, backbone: Backbone, head: Head, *, probe: Ids, dimensions: int) -> None:
        self._backbone = backbone
        self._head = head
        self._probe = probe
        self._dimensions = dimensions

    def __call__(self, rows: Sequence[Ids], *, windows: NDArray[np.bool_], skip: int) -> Outcome:
        """Run ``rows``, each (length,) int32. ``windows`` is (m,) bool: rows that stay un-normalised.

        A forward that raises is bisected down to the texts that fail alone; a vector that is not finite is
        computed once more in fp32. Raises EngineError where even a known good text fails: then the device
        is at fault and no text may be blamed.
        """
        outcome = Outcome(np.zeros((len(rows), self._dimensions), np.float32))
        self._bisect(rows, np.arange(len(rows)), windows, skip, outcome)
        self._mend(rows, windows, skip, outcome)
        return outcome

    def _forward(self, rows: Sequence[Ids], windows: NDArray[np.bool_], skip: int) -> NDArray[np.float32]:
        """(m, dimensions) float32. All modules run on the device; one copy comes back."""
        vectors = self._head(self._backbone(rows), skip=skip)
        final = self._head.finish(vectors)
        if windows.any():
            final = torch.where(torch.from_numpy(windows).to(final.device)[:, None], vectors, final)
        result: NDArray[np.float32] = final.cpu().numpy()
        return result

    def _bisect(
        self,
        rows: Sequence[Ids],
        at: NDArray[np.intp],
        windows: NDArray[np.bool_],
        skip: int,
        outcome: Outcome,
    ) -> None:
        try:
            outcome.vectors[at] = self._forward([rows[position] for position in at], windows[at], skip)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is one text's fault, or the device's
            reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
        else:
            return
        # Out of the except block: its traceback keeps the failed pass's tensors, and their memory, alive.
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(at) == 1:
            self._check_device(reason)
            outcome.failures[int(at[0])] = ("forward_failed", reason)
            return
        half = len(at) // 2
        self._bisect(rows, at[:half], windows, skip, outcome)
        self._bisect(rows, at[half:], windows, skip, outcome)

    def _check_device(self, reason: str) -> None:
        """A broken device fails every text; without this look, a whole job would end in its dead list."""
        try:
            self._forward([self._probe], np.zeros(1, np.bool_), 0)
        except Exception as error:
            raise EngineError(
                f"the model no longer runs on {self._backbone.device}: {reason}. Restart the worker; if it "
                "happens again, lower EMBEDDING_BATCH_TOKENS or check the device"
            ) from error

    def _mend(self, rows: Sequence[Ids], windows: NDArray[np.bool_], skip: int, outcome: Outcome) -> None:
        bad = np.flatnonzero(~np.isfinite(outcome.vectors).all(axis=1))
        if len(bad) and self._backbone.dtype != torch.float32:
            with self._backbone.in_float32():
                self._bisect(rows, bad, windows, skip, outcome)
            bad = bad[~np.isfinite(outcome.vectors[bad]).all(axis=1)]
        for position in bad:
            outcome.failures.setdefault(
                int(position), ("not_finite", "the model's vector for this text is not finite, in fp32 too")
            )
