"""``/v1/embeddings``: one request, answered and charged at once."""

from __future__ import annotations

import time
from collections import deque

from tests.openai_server.answers import embedding_body
from tests.openai_server.errors import ApiError, rate_limited
from tests.openai_server.exchange import Answer, Request
from tests.openai_server.kinds import BODIES
from tests.openai_server.requests import count_tokens, read_request, reported_tokens
from tests.openai_server.store import Store
from tests.openai_server.tokens import counter
from tests.openai_server.vectors import text_hash

SYNC_BODIES = {kind: options for kind, options in BODIES.items() if kind != "string_body"}


def create(store: Store, request: Request) -> Answer:
    limit = store.config.max_request_bytes
    if limit is not None and int(request.headers["content-length"]) > limit:
        raise ApiError(413, "Request Entity Too Large")
    wanted = read_request(request.json(), store.config)
    breaks_at = store.config.breaks_at
    if breaks_at is not None and any(breaks_at in text for text in wanted.texts):
        raise ApiError(500, "The server had an error.", type="server_error")
    tokens = count_tokens(wanted, store.config, counter(store.config.fast_tokens))
    headers = admit(store, wanted.model, tokens)
    subject = {"endpoint": request.endpoint, "id": request.number}
    faults = store.misbehaviours.for_lines(SYNC_BODIES, subject).on(0, wanted.texts)
    body = embedding_body(wanted, reported_tokens(wanted, store.config, tokens), faults)
    assert isinstance(body, dict)
    hashes = [text_hash(text) for text in wanted.texts]
    store.bill.charge(request.number, "sync", wanted.model, 1, tokens, hashes)
    slow_above = store.config.slow_above_inputs
    if slow_above is not None and len(wanted.texts) > slow_above:
        return Answer(None, 504)
    return Answer(body, headers=headers)


def admit(store: Store, model: str, tokens: int) -> dict[str, str]:
    """The headers about what is left of this minute; or a 429 that says when there is room."""
    config = store.config
    window = config.rate_window_seconds
    with store.changed:
        now = time.time()
        lately = store.sync_lately.setdefault(model, deque())
        while lately and lately[0][0] <= now - window:
            lately.popleft()
        used = {"requests": len(lately), "tokens": sum(tokens for _, tokens in lately)}
        limits = {"requests": config.requests_per_minute, "tokens": config.tokens_per_minute}
        asked = {"requests": 1, "tokens": tokens}
        reset = max(0.0, lately[0][0] + window - now) if lately else 0.0
        over = [kind for kind, limit in limits.items() if limit is not None and used[kind] + asked[kind] > limit]
        if not over:
            lately.append((now, tokens))
            used = {kind: used[kind] + asked[kind] for kind in used}
    headers: dict[str, str] = {}
    for kind, limit in limits.items():
        if limit is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, limit - used[kind]))
            headers[f"x-ratelimit-reset-{kind}"] = f"{reset:.3f}s" if reset >= 1 else f"{int(reset * 1000)}ms"
    if over:
        kind = over[0]
        error = rate_limited(
            f"Rate limit reached for {model} in organization org-test on {kind} per min. Limit: {limits[kind]}, "
            f"Used: {used[kind]}, Requested: {asked[kind]}. Please try again in {reset:.3f}s.",
            kind=kind,
        )
        error.headers = {**headers, "retry-after": str(int(reset) + 1), "retry-after-ms": str(int(reset * 1000) + 1)}
        raise error
    return headers
