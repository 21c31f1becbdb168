"""Vectors of texts from a gateway: in pieces, side by side, in one space."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.arguments import as_items, as_number, as_seconds, as_text
from chunkmill.domain.chunks import prepare_all
from chunkmill.domain.embedded import EmbeddedTexts, joined
from chunkmill.errors import GatewayUnavailable, InvalidInput, SpaceMismatch
from chunkmill.remote.asking import LONG_WORK_BYTES, RemoteCalls, told_timeout_ms
from chunkmill.remote.http import IN_FLIGHT
from chunkmill.remote.reading import UnreadableAnswer, parse_object, read_vector
from chunkmill.remote.refusals import Failure
from chunkmill.remote.servers import Server
from chunkmill.remote.steps import ParallelStep, Request, Steps, WorkStep

SPACE_HEADER = "x-chunkmill-fingerprint"
REQUEST_TEXTS = 256
"""How many texts one request has at most, so that the work of a call is spread and short calls come between."""
REQUEST_BYTES = 1024 * 1024
"""Bytes of the texts of one request; a longer text has a request of its own."""
FEW_TEXTS = 32
"""A call with at most this many texts does not ask the gateway for its limit, because every gateway takes more."""
LARGEST_DIMENSIONS = 16_384
"""More dimensions than any model has, for the bound on an answer."""
TEXT_BYTES = 1024
"""Bytes of an answer for each text, beside its vector."""
FIRST_SHARE = 0.5
"""The share of the time that is left, after which a first server that keeps silent is given up for the fallback."""
LEAST_COSINE = 0.999
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Postgres keeps the vectors, and Redis rings the doorbell.",
    "Wie weit ist es von Zürich nach Genf?",
    "def add(a: int, b: int) -> int: return a + b",
)
"""Texts whose vectors tell whether two servers with the same fingerprint compute the same."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Everything that decides which space the vectors are of. Of one value, all vectors are of one space."""

    model: str | None
    dimensions: int | None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of ``embed``. ``deadline`` is by the clock."""

    asked: ModelChoice
    kind: str
    deadline: float


class Embedding(RemoteCalls):
    """The verbs that return vectors of texts."""

    def __init__(self, server: Server, fallback: Server | None, timeout: float) -> None:
        super().__init__(server, fallback, timeout)
        self._lock = threading.Lock()
        self._most: int | None = None
        self._spaces: dict[ModelChoice, str] = {}
        """Which space the vectors of earlier answers were of."""
        self._probes: dict[ModelChoice, NDArray[np.float32]] = {}
        """The first server's vectors of ``PROBES``, with which those of the fallback are compared."""
        self._learning: set[ModelChoice] = set()
        """For which of them some call asks for the probes now."""
        self._checked: set[ModelChoice] = set()
        """For which of them the fallback has shown that it computes the same."""

    def embed(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
    ) -> Steps[NDArray[np.float32]]:
        """``(n, d)`` float32 vectors of ``texts`` in input order, which a worker makes now and nobody stores.

        Many texts are sent in several requests, eight of them side by side. Raises :class:`InvalidChunk` if a text is
        not valid, :class:`SpaceMismatch` if the vectors are of another space than those of an earlier call,
        :class:`WaitTimeout`, :class:`GatewayUnavailable` and what :meth:`Client.embed` raises.
        """
        embedded = yield from self.embed_texts(texts, model=model, kind=kind, timeout=timeout, dimensions=dimensions)
        return embedded.vectors

    def embed_texts(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
    ) -> Steps[EmbeddedTexts]:
        """Like :meth:`embed`, and says how many tokens each text had and whether it was cut."""
        if not isinstance(kind, str) or kind not in ("document", "query"):
            raise InvalidInput("kind must be 'document' or 'query'.")
        timeout, given = as_seconds("timeout", timeout), list(as_items("texts", texts))
        is_long = len(given) > REQUEST_TEXTS
        yield WorkStep(partial(require_texts, given), is_long)
        asked = ModelChoice(
            None if model is None else as_text("model", model),
            None if dimensions is None else as_number("dimensions", dimensions, least=1),
        )
        call = Call(asked, kind, self._deadline(timeout))
        if not given:
            return joined([], (yield from self._dimensions(asked, call.deadline)))
        most = REQUEST_TEXTS if len(given) <= FEW_TEXTS else (yield from self._most_texts(call.deadline))
        pieces: list[Sequence[str]] = yield WorkStep(lambda: list(into_requests(given, most, REQUEST_BYTES)), is_long)
        parts: list[EmbeddedTexts] = yield ParallelStep(
            [partial(self._piece, call, piece) for piece in pieces], IN_FLIGHT
        )
        one_size(self._server, parts)
        whole: EmbeddedTexts = yield WorkStep(lambda: joined(parts, parts[0].vectors.shape[1]), is_long)
        return whole

    def _most_texts(self, deadline: float) -> Steps[int]:
        """How many texts one request may have. It is asked once; if ``/info`` does not say it, halves are tried."""
        if self._most is None:
            result = yield from self._attempt(self._server, Request("GET", "/info", self._left(deadline)))
            if isinstance(result, Failure):
                return REQUEST_TEXTS
            content = result.body
            info = yield from self._read(self._server, content, lambda: parse_object(content))
            most = info.get("max_client_batch_size")
            is_number = isinstance(most, int) and not isinstance(most, bool) and most > 0
            self._most = min(REQUEST_TEXTS, int(most)) if is_number and most else REQUEST_TEXTS
        return self._most

    def _dimensions(self, asked: ModelChoice, deadline: float) -> Steps[int]:
        """How many dimensions the vectors of no texts have."""
        if asked.dimensions is not None:
            return asked.dimensions
        probe = yield from self._piece(Call(asked, "document", deadline), PROBES[:1])
        return int(probe.vectors.shape[1])

    def _piece(self, call: Call, texts: Sequence[str]) -> Steps[EmbeddedTexts]:
        """The texts of one request, or of its halves if they are too many for the gateway."""
        tries = 0
        while True:
            server = yield from self._server_for(call)
            if isinstance(server, Failure):
                yield from self._wait(server, tries, call.deadline)
                tries += 1
                continue
            seconds = self._left(call.deadline)
            if server is self._server and self._fallback is not None and call.asked in self._probes:
                seconds = max(0.001, seconds * FIRST_SHARE)
            result = yield from self._embedded_by(server, call, texts, seconds)
            if isinstance(result, EmbeddedTexts):
                yield from self._learn_probes(server, call)
                return result
            if result.is_too_large and len(texts) > 1:
                half = len(texts) // 2
                first = yield from self._piece(call, texts[:half])
                second = yield from self._piece(call, texts[half:])
                return joined(one_size(server, [first, second]), first.vectors.shape[1])
            if not result.may_repeat:
                raise result.error
            if self._fallback is not None and call.asked in self._probes:
                if server is self._server:
                    self._server.failed(self._clock(), result.retry_after)
                    tries += 1
                    continue
                self._server.wanted_again()
            yield from self._wait(result, tries, call.deadline)
            tries += 1

    def _server_for(self, call: Call) -> Steps[Server | Failure]:
        """The server that is to be asked now, or why neither can be.

        Raises :class:`SpaceMismatch` if the fallback is of another space.
        """
        if self._fallback is None or self._server.is_up(self._clock()) or call.asked not in self._probes:
            return self._server
        if call.asked not in self._checked:
            probe = Call(call.asked, "document", call.deadline)
            result = yield from self._embedded_by(self._fallback, probe, PROBES, self._left(call.deadline))
            if isinstance(result, Failure):
                if not result.may_repeat:
                    raise result.error
                self._server.wanted_again()
                return result
            self._require_same(self._probes[call.asked], result.vectors, self._fallback)
            self._checked.add(call.asked)
        return self._fallback

    def _learn_probes(self, server: Server, call: Call) -> Steps[None]:
        """Keep the first server's vectors of the probes, while it answers. Without them no fallback can be checked."""
        if server is not self._server:
            return
        server.answered()
        if self._fallback is None:
            return
        with self._lock:
            if call.asked in self._probes or call.asked in self._learning:
                return
            self._learning.add(call.asked)
        try:
            probe = Call(call.asked, "document", call.deadline)
            result = yield from self._embedded_by(server, probe, PROBES, self._left(call.deadline))
            if isinstance(result, EmbeddedTexts):
                self._probes[call.asked] = result.vectors
        finally:
            self._learning.discard(call.asked)

    def _embedded_by(
        self, server: Server, call: Call, texts: Sequence[str], seconds: float
    ) -> Steps[EmbeddedTexts | Failure]:
        body: dict[str, Any] = {
            "input": list(texts),
            "encoding_format": "base64",
            "kind": call.kind,
            "return_tokens": True,
            "timeout_ms": told_timeout_ms(seconds),
        }
        if call.asked.model is not None:
            body["model"] = call.asked.model
        if call.asked.dimensions is not None:
            body["dimensions"] = call.asked.dimensions
        dimensions = call.asked.dimensions or LARGEST_DIMENSIONS
        content: bytes = yield WorkStep(
            lambda: json.dumps(body, ensure_ascii=False).encode(), sum(map(len, texts)) > LONG_WORK_BYTES
        )
        request = Request(
            "POST",
            "/v1/embeddings",
            seconds,
            headers={"content-type": "application/json"},
            body=content,
            longest=64 * 1024 + len(texts) * (TEXT_BYTES + 4 * dimensions * 4 // 3),
        )
        answer = yield from self._attempt(server, request)
        if isinstance(answer, Failure):
            return answer
        answered = answer.body
        self._require_space(server, call.asked, answer.headers.get(SPACE_HEADER))
        return (yield from self._read(server, answered, lambda: read_embedded(answered, len(texts))))

    def _require_space(self, server: Server, asked: ModelChoice, space: str | None) -> None:
        if not space:
            raise GatewayUnavailable(
                f"{server.name} did not say of which space its vectors are (the header {SPACE_HEADER}), so they could "
                "be of any. Ask a gateway of Chunkmill, and let proxies pass that header on."
            )
        with self._lock:
            known = self._spaces.setdefault(asked, space)
        if known != space:
            raise SpaceMismatch(
                f"{server.name} answered with vectors of space {space[:12]!r}, and earlier answers were of space "
                f"{known[:12]!r}: they must not be compared with each other. Another model stands behind that address "
                "now. Name the model, or make a new client and embed everything again."
            )

    def _require_same(self, ours: NDArray[np.float32], theirs: NDArray[np.float32], fallback: Server) -> None:
        advice = "It is not used, because its vectors must not be mixed with the others."
        if ours.shape != theirs.shape:
            raise SpaceMismatch(f"fallback {fallback.name} makes vectors of another size. {advice}")
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines = np.einsum("nd,nd->n", ours, theirs, dtype=np.float64) / np.maximum(lengths, 1e-30)
        if (least := float(cosines.min())) < LEAST_COSINE:
            raise SpaceMismatch(
                f"fallback {fallback.name} has the same fingerprint, and its vectors differ: the cosine of a probe is "
                f"{least:.4f}, and must be at least {LEAST_COSINE}. {advice}"
            )


def require_texts(texts: Sequence[str]) -> None:
    """Raise :class:`InvalidChunk` for the first that is not valid."""
    for _ in prepare_all(((f"texts[{i}]", text) for i, text in enumerate(texts))):
        pass


def into_requests(texts: Sequence[str], most: int, most_bytes: int) -> Iterable[Sequence[str]]:
    """The texts in pieces of at most ``most`` texts and ``most_bytes`` bytes, as UTF-8, or of one longer text."""
    begin, size = 0, 0
    for i, text in enumerate(texts):
        n_bytes = len(text.encode())
        if i > begin and (i - begin == most or size + n_bytes > most_bytes):
            yield texts[begin:i]
            begin, size = i, 0
        size += n_bytes
    if begin < len(texts):
        yield texts[begin:]


def read_embedded(body: bytes, n: int) -> EmbeddedTexts:
    """The vectors of an answer to ``n`` texts. Raises :class:`UnreadableAnswer`."""
    answered = parse_object(body)
    data = answered.get("data")
    if not isinstance(data, list) or len(data) != n:
        raise UnreadableAnswer(f"data does not have the vectors of {n:,} texts")
    vectors, seen = np.empty((n, 0), np.float32), np.zeros(n, np.bool_)
    for item in data:
        i = item.get("index") if isinstance(item, dict) else None
        if not _is_number(i, n) or seen[i]:
            raise UnreadableAnswer("data does not have each index once")
        seen[i] = True
        vector = read_vector(item.get("embedding"), f"data[{i}].embedding", vectors.shape[1] or None)
        if not vectors.shape[1]:
            vectors = np.empty((n, len(vector)), np.float32)
        vectors[i] = vector
    counts, cut_ones = answered.get("tokens", [0] * n), answered.get("truncated", [])
    if not isinstance(counts, list) or len(counts) != n or not all(_is_number(count, 2**31) for count in counts):
        raise UnreadableAnswer(f"tokens does not have the numbers of {n:,} texts")
    if not isinstance(cut_ones, list) or not all(_is_number(i, n) for i in cut_ones):
        raise UnreadableAnswer("truncated does not have positions of texts")
    truncated = np.zeros(n, np.bool_)
    truncated[np.array(cut_ones, np.intp)] = True
    return EmbeddedTexts(vectors, np.array(counts, np.int32), truncated)


def _is_number(value: object, bound: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < bound


def one_size(server: Server, parts: list[EmbeddedTexts]) -> list[EmbeddedTexts]:
    """The parts. Raises :class:`SpaceMismatch` if their vectors have several sizes."""
    if len({part.vectors.shape[1] for part in parts}) > 1:
        raise SpaceMismatch(f"{server.name} answered parts of one call with vectors of several sizes.")
    return parts
