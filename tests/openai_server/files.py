"""``/v1/files``."""

from __future__ import annotations

import time

from tests.openai_server.errors import ApiError, bad, no_such_file
from tests.openai_server.exchange import Answer, Request, expiry, page
from tests.openai_server.multipart import read_form
from tests.openai_server.odd import IDS, drawn
from tests.openai_server.store import EXPIRES_AFTER_SECONDS, Store

FORM_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}


def create(store: Store, request: Request) -> Answer:
    path = request.body.with_suffix(".file")
    try:
        form = read_form(request.body, request.headers.get("content-type", ""), path)
        if unknown := sorted(set(form.fields) - FORM_FIELDS):
            raise bad(f"Unknown parameter: '{unknown[0]}'.", param=unknown[0], code="unknown_parameter")
        if not store.config.file_expiry and any(name.startswith("expires_after") for name in form.fields):
            raise bad("Unknown parameter: 'expires_after'.", param="expires_after", code="unknown_parameter")
        if form.filename is None:
            raise bad("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        if form.fields.get("purpose") != "batch":
            raise bad(f"'{form.fields.get('purpose')}' is not one of ['batch'] - 'purpose'", param="purpose")
        if not form.filename.endswith(".jsonl"):
            raise bad("Invalid file format for Batch API. Must be .jsonl", param="file")
        if path.stat().st_size > store.config.max_file_bytes:
            if store.config.too_large_status == 413:
                return Answer(None, 413)  # a gateway's page
            raise bad("File is too large.")
        seconds = EXPIRES_AFTER_SECONDS
        if "expires_after[anchor]" in form.fields or "expires_after[seconds]" in form.fields:
            text = form.fields.get("expires_after[seconds]", "")
            wanted = int(text) if text.isdecimal() else None
            seconds = expiry(form.fields.get("expires_after[anchor]"), wanted, "expires_after")
        made = store.add_file(path, form.filename, "batch", seconds).as_json()
        subject = {"endpoint": request.endpoint, "id": made["id"], "filename": form.filename, "purpose": "batch"}
        if (wish := store.misbehaviours.strike("odd_file_id", subject)) is not None:
            made["id"] = drawn(wish["value"], IDS, "file", store.config.seed)
        return Answer(made)
    finally:
        path.unlink(missing_ok=True)


def listed(store: Store, request: Request) -> Answer:
    purpose, order = request.query.get("purpose"), request.query.get("order", "desc")
    latest = time.time() - store.config.files_lag_seconds
    with store.changed:
        files = [file for file in store.files.values() if file.created <= latest]
    if order == "desc":
        files.reverse()
    elif order != "asc":
        raise bad("Invalid 'order': must be 'asc' or 'desc'.", param="order")
    wanted = [file.as_json() for file in files if purpose in (None, file.purpose)]
    return page(wanted, request, default=10_000, most=10_000)


def retrieve(store: Store, request: Request) -> Answer:
    return Answer(store.file(request.id).as_json())


def delete(store: Store, request: Request) -> Answer:
    file = store.file(request.id)
    subject = {"endpoint": request.endpoint, "id": file.id, "filename": file.filename, "purpose": file.purpose}
    if (wish := store.misbehaviours.strike("delete_fails", subject)) is not None:
        raise ApiError(wish["status"], "The file could not be deleted.", type="server_error")
    store.remove_file(file.id)
    return Answer({"id": file.id, "object": "file", "deleted": True})


def content(store: Store, request: Request) -> Answer:
    file = store.file(request.id)
    subject = {"endpoint": request.endpoint, "id": file.id, "filename": file.filename, "purpose": file.purpose}
    if file.purpose == "batch_output" and store.misbehaviours.strike("output_vanished", subject) is not None:
        store.remove_file(file.id)
        raise no_such_file(file.id)
    answer = Answer(file=file.path, length=file.bytes)
    if (wish := store.misbehaviours.strike("truncated", subject)) is not None:
        answer.length = int(file.bytes * wish["fraction"])
    if (wish := store.misbehaviours.strike("cut_body", subject)) is not None:
        answer.cut_at = int(file.bytes * wish["fraction"])
    return answer
