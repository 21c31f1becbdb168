"""Every misbehaviour there is: its name, what it does, its options and their defaults."""

from __future__ import annotations

from typing import Any

# Answers of any endpoint (narrow with where={"endpoint": ...}). ``applied``: the request was carried out all the same.
ANSWERS: dict[str, dict[str, Any]] = {
    "http_error": {
        "status": 500,
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "code": None,
        "retry_after": None,
        "html": False,  # a gateway's page in place of OpenAI's JSON
        "applied": False,
    },
    "rate_limited": {"retry_after": None, "retry_after_ms": None, "code": "rate_limit_exceeded"},
    "insufficient_quota": {},  # 429 that no waiting helps
    "unauthorized": {},  # 401 whose message echoes the whole key
    "hang": {"seconds": 30.0, "applied": False},  # no answer for so long, then the connection is cut
    "cut": {"applied": False},  # the connection is cut in place of an answer
    "slow": {"seconds": 1.0},
}
# Answers that break the protocol or our patience, also of any endpoint.
ODD: dict[str, dict[str, Any]] = {
    "redirect": {"status": 307, "location": "https://elsewhere.example/v1/x", "applied": False},
    "encoded": {"encoding": "gzip", "bytes": 0, "status": 200, "applied": True},  # bytes: blanks in place of the answer
    "drip": {"headers": False, "seconds": 0.01, "applied": True},  # a byte at a time
    "endless": {"bytes": 1 << 26, "status": 200, "applied": True},  # a body of one line
    "deep": {"levels": 100_000, "applied": True},  # nested JSON
}
# One endpoint each, known without a ``where``.
ENDPOINTS: dict[str, dict[str, Any]] = {
    "enqueued_on_create": {"status": 429},  # token_limit_exceeded as an answer to create
    "input_vanished": {},  # create cannot find its file, and it is gone
    "created_twice": {},  # one create makes two batches, the older is answered
    "metadata_dropped": {},
    "delete_fails": {"status": 500},
    "odd_file_id": {"value": None},  # of an uploaded file
    "output_vanished": {},  # 404 for a result file's content, and the file is gone
    "truncated": {"fraction": 0.5},  # content ends early in mid-line, and Content-Length agrees
    "cut_body": {"fraction": 0.5},  # content's connection is cut in mid-body
}
# Batch objects as they are shown, each answer a chance (times=None to keep it up).
SHAPES: dict[str, dict[str, Any]] = {
    "odd_status": {},  # "Validating"
    "iso_dates": {},
    "null_counts": {},
    "null_usage": {},
    "empty_file_ids": {},  # "" where a file id would be null
    "late_file_ids": {},  # null for both file ids of a batch that has ended
    "no_expiry": {},  # null for expires_at, as on Azure
    "odd_id": {"field": "output_file_id", "value": None},  # None: one that the server's seed chooses
    "odd_count": {"field": "request_counts.total", "value": None},
    "odd_words": {"value": None},  # in errors, for whatever status
}
# How a batch goes; each batch is a chance. Its endpoint is "batches.create".
ENDINGS: dict[str, dict[str, Any]] = {
    "fail_validation": {"code": "invalid_request", "message": None, "line": None, "param": None},
    "cannot_find_file": {},
    "failed_after_running": {"usage": True},  # executed and charged, then failed, without files; counts say so
    "stuck": {"status": "in_progress"},  # executed and charged, and then nothing; after a cancel cancelling, for ever
    "expire": {"fraction": None, "error_lines": True},
    "cancelled_by_other": {"fraction": None},
    "all_failed": {"status": 500, "code": None, "message": "The server had an error."},  # completed, no output file
    "empty_error_file": {},  # zero bytes, with nothing failed
}
# Which lines of a struck batch: those whose text holds ``marker``, or every n-th, or else the first ``lines``.
_CHOICE: dict[str, Any] = {"marker": None, "every": None, "lines": 1}
# Lines of the result files; each batch with such a line is a chance. What these lose was executed and is charged.
LINES: dict[str, dict[str, Any]] = {
    "line_failures": {**_CHOICE, "status": 400, "code": None, "message": "This request failed."},  # not charged
    "garbage_line": {**_CHOICE, "extra": False},  # a cut line in place of the result, or beside it
    "duplicate_line": _CHOICE,
    "missing_line": _CHOICE,
    "unknown_line": _CHOICE,  # one more, with a custom_id nobody sent
    "null_custom_id": _CHOICE,
    "long_line": {**_CHOICE, "bytes": 1 << 22, "extra": False},  # in place of the result, or beside it
}
# The body of a result line or of a sync answer; each batch with such a line and each sync request is a chance.
BODIES: dict[str, dict[str, Any]] = {
    "wrong_dimensions": {**_CHOICE, "dimensions": None},  # None: half
    "not_finite": {**_CHOICE, "value": "nan"},  # or "inf"
    "zero_vector": _CHOICE,
    "missing_index": _CHOICE,  # data without "index"
    "missing_item": _CHOICE,  # one of data is not there
    "shuffled_data": _CHOICE,  # not in the order of index
    "other_encoding": _CHOICE,  # base64 where numbers were asked for, and the other way round
    "string_body": _CHOICE,  # batches only: response.body is JSON in a string
    "missing_usage": _CHOICE,
    "odd_usage": {**_CHOICE, "value": None, "factor": None},  # that value, or so many times what is right
    "odd_index": {**_CHOICE, "how": "first"},  # "first" has none, "zero": all are 0, "one": item 1 says 0, as 0 does
    "other_model": {**_CHOICE, "name": "text-embedding-ada-002"},
}
KINDS = {**ANSWERS, **ODD, **ENDPOINTS, **SHAPES, **ENDINGS, **LINES, **BODIES}
