"""Reads what a provider says about a batch, in whatever form. Pure.

The official client does not check it, and servers send ISO dates, null counts, empty file ids and capital letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from chunkmill.openai.wire.bounds import count, identifier
from chunkmill.openai.wire.redaction import clean, redact


class RemoteStatus(StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """A status that we do not know; the batch may still be running."""

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


MAX_ERRORS: Final = 1_000
"""How many errors of a batch are read. The first of them say what to do."""
_TERMINAL: Final = {RemoteStatus.COMPLETED, RemoteStatus.FAILED, RemoteStatus.EXPIRED, RemoteStatus.CANCELLED}
_BY_LETTERS: Final = {status.replace("_", ""): status for status in RemoteStatus} | {
    "canceling": RemoteStatus.CANCELLING,
    "canceled": RemoteStatus.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class BatchError:
    """One of ``batch.errors``, which say why a file failed validation. ``message`` is redacted."""

    code: str
    message: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class RemoteBatch:
    id: str
    status: RemoteStatus
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: datetime | None
    expires_at: datetime | None
    ended_at: datetime | None
    """When it reached its terminal status; None while it runs, or if the provider does not say."""
    total: int | None
    completed: int | None
    failed: int | None
    errors: tuple[BatchError, ...]
    used_tokens: int | None
    """``usage.total_tokens``, which is zero while the batch runs."""
    has_begun: bool = False
    """Whether the provider says when it began to run the requests, which it does once the file is validated."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended. With any of these statuses either file may be there, and the counts may not add up."""
        return self.status.is_terminal

    @property
    def has_unknown_cost(self) -> bool:
        """Whether the provider says neither how many requests are done nor what they cost."""
        return self.completed is None and self.used_tokens is None

    @property
    def may_have_run(self) -> bool:
        """Whether some of its requests may have been charged, also if it failed. A refused file costs nothing."""
        has_file = bool(self.output_file_id or self.error_file_id)
        return bool(self.completed or self.used_tokens) or has_file or (self.has_begun and self.has_unknown_cost)


def remote_batch(given: object, secrets: Sequence[str] = ()) -> RemoteBatch:
    """Read a batch from the client's object or a mapping, without ``secrets``.

    Raises a ValueError if it has no id, or that names the field if an id or a count is out of bounds.
    """
    batch_id = identifier("id", _get(given, "id"), secrets)
    if batch_id is None:
        raise ValueError("a batch without an id")
    status = read_status(_get(given, "status"))
    counts, usage = _get(given, "request_counts"), _get(given, "usage")
    return RemoteBatch(
        id=batch_id,
        status=status,
        input_file_id=identifier("input_file_id", _get(given, "input_file_id"), secrets),
        output_file_id=identifier("output_file_id", _get(given, "output_file_id"), secrets),
        error_file_id=identifier("error_file_id", _get(given, "error_file_id"), secrets),
        created_at=read_time(_get(given, "created_at")),
        expires_at=read_time(_get(given, "expires_at")),
        ended_at=read_time(_get(given, f"{status}_at")) if status in _TERMINAL else None,
        total=count("request_counts.total", _get(counts, "total")),
        completed=count("request_counts.completed", _get(counts, "completed")),
        failed=count("request_counts.failed", _get(counts, "failed")),
        errors=_errors(_get(given, "errors"), secrets),
        used_tokens=count("usage.total_tokens", _get(usage, "total_tokens")),
        has_begun=any(read_time(_get(given, name)) for name in ("in_progress_at", "finalizing_at")),
        metadata=_metadata(_get(given, "metadata"), secrets),
    )


def belongs_to(given: object, input_file_id: str, pair: tuple[str, str]) -> bool:
    """Whether a batch was made of this input file, or has this pair in its metadata, whatever else is odd about it."""
    return (
        _get(given, "input_file_id") == input_file_id or _metadata(_get(given, "metadata"), ()).get(pair[0]) == pair[1]
    )


def read_status(given: object) -> RemoteStatus:
    """The status that is meant; ``Validating``, ``in-progress`` and ``canceled`` are understood too."""
    letters = re.sub("[^a-z]", "", clean(getattr(given, "value", given))[:40].lower())
    return _BY_LETTERS.get(letters, RemoteStatus.UNKNOWN)


def read_time(given: object) -> datetime | None:
    """The time in UTC, from Unix seconds or an ISO date. None for zero and for anything else."""
    try:
        if isinstance(given, str) and not re.fullmatch(r"[0-9]+(\.[0-9]*)?", given, re.ASCII):
            at = datetime.fromisoformat(given)
            return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
        seconds = float(given) if isinstance(given, str | int | float) else 0.0
        return datetime.fromtimestamp(seconds, UTC) if seconds > 0 else None
    except (ValueError, OverflowError, OSError):
        return None


def _get(given: object, name: str) -> Any:
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def _errors(given: object, secrets: Sequence[str]) -> tuple[BatchError, ...]:
    """The errors in a list, or in an object with the list ``data``. One without a code is ``unknown_error``."""
    data = given if isinstance(given, list | tuple) else _get(given, "data")
    return tuple(
        BatchError(
            redact(_code(_get(error, "code")), secrets) or "unknown_error",
            redact(_get(error, "message"), secrets),
            count("errors.line", _get(error, "line")),
        )
        for error in (data[:MAX_ERRORS] if isinstance(data, list | tuple) else ())
    )


def _code(given: object) -> str | None:
    return given if isinstance(given, str) else None


def _metadata(given: object, secrets: Sequence[str]) -> dict[str, str]:
    pairs = given.items() if isinstance(given, Mapping) else ()
    return {redact(key, secrets): redact(value, secrets) for key, value in pairs}
