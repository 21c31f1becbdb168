"""Embeds the texts that somebody waits for, between the TokenBatches of bulk work."""

from __future__ import annotations

from typing import Literal

from chunkmill.errors import DeviceFailed
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import EmbedRequest
from chunkmill.spaces import registry
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.process.responder import Responder
from chunkmill_workers.process.unserved import Unserved


class EmbedResponder(Responder[WorkerContext]):
    """Answers embed requests one by one, in the spaces that this worker serves."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__("embed-requests", context)

    @property
    def unserved(self) -> Unserved:
        return self._context.engines.left_to_others

    def answer_next(self) -> bool:
        """Answer one request. Returns False if there is none, or if this worker leaves or is broken."""
        if self._context.stopping.is_set() or self._context.broken:
            return False
        claimed = self.claim(lambda conn, unserved: embed_requests.claim_next(conn, not_spaces=unserved))
        if claimed is None:
            return False
        self._answer(*claimed)
        return True

    def _answer(self, request: EmbedRequest, space: registry.Space) -> None:
        kind: Literal["document", "query"] = "query" if request.kind == "query" else "document"
        spec = space.spec
        try:
            engine = self._context.engine_for(space)
            result = engine.embed(request.texts, kind=kind, on_long=spec.long_text.policy, urgent=True)
        except DeviceFailed as broken:
            # The request is not the reason: its lease ends, and another worker answers. The watchdog ends this worker.
            self._context.broken = str(broken)
            return
        except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits must get a reason
            self.end_without_vectors(request, error)
            return
        COUNTS.add_all(
            (
                (m.URGENT_TEXTS, len(request.texts)),
                (m.TOKEN_BATCHES, result.timings.token_batches),
                (m.TOKENS, result.timings.tokens),
                (m.PADDED_TOKENS, result.timings.padded_tokens),
                (m.ENGINE_SECONDS, result.timings.forward),
                (m.TOKENIZE_SECONDS, result.timings.tokenize),
            )
        )
        with self._context.db.begin() as conn:
            vectors = shorten(result.vectors, spec.dimensions, normalize=spec.normalize)
            embed_requests.answer(conn, request.id, vectors, result.n_tokens, result.truncated)
