"""``/v1/batches``."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from typing import Any

from tests.openai_server.errors import ApiError, bad, cannot_find_file, rate_limited
from tests.openai_server.exchange import Answer, Request, expiry, page
from tests.openai_server.lifecycle import STAMPS, TERMINAL, Life, counts, move, usage
from tests.openai_server.odd import IDS, NUMBERS, WORDS, drawn, put
from tests.openai_server.store import EXPIRES_AFTER_SECONDS, Batch, Store, StoredFile, enqueued_message
from tests.openai_server.validation import read_plan
from tests.support.waiting import PATIENCE

REQUIRED = ("input_file_id", "endpoint", "completion_window")
OPTIONAL = ("metadata", "output_expires_after")


def create(store: Store, request: Request) -> Answer:
    check_batches(store)
    body = request.json()
    file, expires = check_body(store, body)
    subject = {"endpoint": request.endpoint, "id": file.id, "filename": file.filename, "metadata": body.get("metadata")}
    if store.misbehaviours.strike("input_vanished", subject) is not None:
        store.remove_file(file.id)
        raise bad(cannot_find_file(file.id), param="file_id")
    if (wish := store.misbehaviours.strike("enqueued_on_create", subject)) is not None:
        message = enqueued_message("token limit reached", store.config.enqueued_tokens or 0, "tokens")
        raise ApiError(wish["status"], message, type="tokens", code="token_limit_exceeded")
    check_rate(store)
    times = 1 if store.misbehaviours.strike("created_twice", subject) is None else 2
    if store.misbehaviours.strike("metadata_dropped", subject) is not None:
        body["metadata"] = None
    made = [make(store, body, file, expires) for _ in range(times)]
    return Answer(made[0])


def check_batches(store: Store) -> None:
    if not store.config.batches:
        raise ApiError(404, "Not Found", code=None)


def check_body(store: Store, body: dict[str, Any]) -> tuple[StoredFile, int]:
    """The input file, and when the output is to expire."""
    if unknown := sorted(set(body) - {*REQUIRED, *OPTIONAL}):
        raise bad(f"Unknown parameter: '{unknown[0]}'.", param=unknown[0], code="unknown_parameter")
    for name in REQUIRED:
        if not isinstance(body.get(name), str):
            raise bad(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if body["endpoint"] != "/v1/embeddings":
        raise bad(
            f"Invalid value: '{body['endpoint']}'. This server has '/v1/embeddings'.", "endpoint", "invalid_value"
        )
    if body["completion_window"] != "24h":
        raise bad("Invalid value for 'completion_window'. Supported: '24h'.", "completion_window", "invalid_value")
    check_metadata(body.get("metadata"))
    expires = EXPIRES_AFTER_SECONDS
    if (wanted := body.get("output_expires_after")) is not None:
        if not isinstance(wanted, dict) or set(wanted) - {"anchor", "seconds"}:
            raise bad("Invalid 'output_expires_after'.", param="output_expires_after")
        expires = expiry(wanted.get("anchor"), wanted.get("seconds"), "output_expires_after")
    try:
        file = store.file(body["input_file_id"])
    except ApiError:
        raise bad(cannot_find_file(body["input_file_id"]), param="file_id") from None
    if file.purpose != "batch":
        raise bad(f"Invalid file purpose '{file.purpose}': a batch needs 'batch'.", param="input_file_id")
    return file, expires


def check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > 16:
        raise bad("Invalid 'metadata': at most 16 pairs.", param="metadata")
    for name, value in metadata.items():
        if len(name) > 64 or not isinstance(value, str) or len(value) > 512:
            raise bad("Invalid 'metadata': names of 64 and strings of 512 characters at most.", param="metadata")


def check_rate(store: Store) -> None:
    limit = store.config.batches_per_hour
    now = time.time()
    with store.changed:
        lately = store.created_lately
        while lately and lately[0] <= now - 3_600:
            lately.popleft()
        if limit is not None and len(lately) >= limit:
            error = rate_limited(f"Rate limit reached for batch creation. Limit: {limit} per hour.")
            error.headers["retry-after"] = str(int(lately[0] + 3_600 - now) + 1) if lately else "3600"
            raise error
        lately.append(now)


def make(store: Store, body: dict[str, Any], file: StoredFile, expires: int) -> dict[str, Any]:
    batch_id, created = store.new_batch_id(), time.time()
    link = store.folder / f"{store.new_id('link_')}.input"  # an id may be given again
    try:
        os.link(file.path, link)
    except FileNotFoundError:  # deleted this moment
        raise bad(cannot_find_file(file.id), param="file_id") from None
    shown: dict[str, Any] = {
        "id": batch_id,
        "object": "batch",
        "endpoint": body["endpoint"],
        "model": None,
        "errors": None,
        "input_file_id": file.id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(created - store.config.clock_behind_seconds),
        "in_progress_at": None,
        "expires_at": int(created + store.config.window_seconds),
        **dict.fromkeys(STAMPS.values()),
        "request_counts": counts(),
        "usage": usage(),
        "metadata": body.get("metadata"),
    }
    batch = Batch(shown, created, link, file.filename, expires)
    if store.config.enqueued_overflow == "create":
        reserve_now(store, batch)
    with store.changed:
        store.batches[batch_id] = batch
        store.batches_created += 1
    threading.Thread(target=Life(store, batch).run, name=batch_id, daemon=True).start()
    return shown


def reserve_now(store: Store, batch: Batch) -> None:
    """A file that is valid is counted as enqueued at once; one that is not fails later, as ever."""
    plan = read_plan(batch.input, batch.shown["endpoint"], store.config)
    if isinstance(plan, list):
        return
    if (refusal := store.reserve(plan)) is not None:
        batch.input.unlink()
        raise rate_limited(refusal, "token_limit_exceeded", "tokens")
    batch.plan, batch.reserved = plan, True


def find(store: Store, batch_id: str) -> Batch:
    check_batches(store)
    with store.changed:
        if batch_id not in store.batches:
            raise ApiError(404, f"No batch found with id '{batch_id}'.", param="batch_id")
        return store.batches[batch_id]


def retrieve(store: Store, request: Request) -> Answer:
    batch = find(store, request.id)
    with store.changed:
        batch.gets += 1
        store.changed.notify_all()
        config, steps = store.config, batch.steps
        if config.driver == "gets" and batch.gets >= config.gets_per_step and batch.status not in TERMINAL:
            store.changed.wait_for(lambda: batch.steps > steps, timeout=PATIENCE)
        return Answer(shown(store, batch, request.endpoint))


def listed(store: Store, request: Request) -> Answer:
    check_batches(store)
    latest = time.time() - store.config.list_lag_seconds
    with store.changed:
        batches = [batch for batch in reversed(store.batches.values()) if batch.created <= latest]
    answer = page([batch.shown for batch in batches], request, default=20, most=100)
    assert answer.body is not None
    on_page = {shown_batch["id"] for shown_batch in answer.body["data"]}
    answer.body["data"] = [shown(store, batch, request.endpoint) for batch in batches if batch.id in on_page]
    return answer


def cancel(store: Store, request: Request) -> Answer:
    batch = find(store, request.id)
    if batch.status != "cancelling" and not move(
        store, batch, ("validating", "in_progress", "finalizing"), "cancelling"
    ):
        raise ApiError(409, f"Cannot cancel a batch with status '{batch.status}'.")
    return Answer(shown(store, batch, request.endpoint))


def shown(store: Store, batch: Batch, endpoint: str) -> dict[str, Any]:
    """The object as this answer shows it, true or odd."""
    seen = dict(batch.shown)
    subject = {**batch.subject, "endpoint": endpoint}
    strike = store.misbehaviours.strike
    if strike("odd_status", subject) is not None:
        seen["status"] = seen["status"].capitalize()
    if strike("null_counts", subject) is not None:
        seen["request_counts"] = None
    if strike("null_usage", subject) is not None:
        seen["usage"] = None
    if strike("empty_file_ids", subject) is not None:
        seen |= {name: seen[name] or "" for name in ("output_file_id", "error_file_id")}
    if seen["status"] in TERMINAL and strike("late_file_ids", subject) is not None:
        seen |= {"output_file_id": None, "error_file_id": None}
    if strike("no_expiry", subject) is not None:
        seen["expires_at"] = None
    for kind, values in (("odd_id", IDS), ("odd_count", NUMBERS)):
        if (wish := strike(kind, subject)) is not None:
            seen = put(seen, wish["field"], drawn(wish["value"], values, kind, store.config.seed))
    if (wish := strike("odd_words", subject)) is not None:
        words = drawn(wish["value"], WORDS, store.config.seed)
        seen["errors"] = {"object": "list", "data": [{"code": words, "message": words, "line": None, "param": None}]}
    if strike("iso_dates", subject) is not None:
        times = {name: value for name, value in seen.items() if name.endswith("_at") and value is not None}
        seen |= {name: datetime.fromtimestamp(value, UTC).isoformat() for name, value in times.items()}
    return seen
