"""What the provider says of a batch, whatever its dialect. Pure.

The SDK checks nothing: servers send ISO dates, null counts, empty file ids and capital letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from chunkmill.openai.wire.redaction import redact


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
    """A word we do not know: still running, as far as we can tell."""


_TERMINAL: Final = {RemoteStatus.COMPLETED, RemoteStatus.FAILED, RemoteStatus.EXPIRED, RemoteStatus.CANCELLED}
_BY_LETTERS: Final = {status.replace("_", ""): status for status in RemoteStatus} | {
    "canceling": RemoteStatus.CANCELLING,
    "canceled": RemoteStatus.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class BatchError:
    """One of ``batch.errors``: why a file failed validation. ``message`` is redacted."""

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
    """When it reached its terminal status; None while it runs, or where the provider does not say."""
    total: int | None
    completed: int | None
    failed: int | None
    errors: tuple[BatchError, ...]
    used_tokens: int | None
    """``usage.total_tokens``: zero while it runs, whatever it will be."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_terminal(self) -> bool:
        """Terminal says little: either file may be there with any of these, and the counts may not add up."""
        return self.status in _TERMINAL


def remote_batch(given: object, secrets: Sequence[str] = ()) -> RemoteBatch:
    """From the SDK's object or a mapping. Raises ValueError for what has no id. ``secrets`` are cut from messages."""
    batch_id = _text(_get(given, "id"))
    if batch_id is None:
        raise ValueError("a batch without an id")
    status = read_status(_get(given, "status"))
    counts, usage = _get(given, "request_counts"), _get(given, "usage")
    return RemoteBatch(
        id=batch_id,
        status=status,
        input_file_id=_text(_get(given, "input_file_id")),
        output_file_id=_text(_get(given, "output_file_id")),
        error_file_id=_text(_get(given, "error_file_id")),
        created_at=read_time(_get(given, "created_at")),
        expires_at=read_time(_get(given, "expires_at")),
        ended_at=read_time(_get(given, f"{status}_at")) if status in _TERMINAL else None,
        total=_count(_get(counts, "total")),
        completed=_count(_get(counts, "completed")),
        failed=_count(_get(counts, "failed")),
        errors=_errors(_get(given, "errors"), secrets),
        used_tokens=_count(_get(usage, "total_tokens")),
        metadata=_metadata(_get(given, "metadata")),
    )


def read_status(given: object) -> RemoteStatus:
    """``Validating``, ``in-progress`` and ``canceled`` are known, too."""
    letters = re.sub("[^a-z]", "", str(getattr(given, "value", given)).lower())
    return _BY_LETTERS.get(letters, RemoteStatus.UNKNOWN)


def read_time(given: object) -> datetime | None:
    """Of Unix seconds or an ISO date, in UTC. None for nothing, zero and what is neither."""
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


def _text(given: object) -> str | None:
    return given if isinstance(given, str) and given else None


def _count(given: object) -> int | None:
    return given if type(given) is int and given >= 0 else None


def _errors(given: object, secrets: Sequence[str]) -> tuple[BatchError, ...]:
    """Of a list object with ``data``, or of a list. An error without a code is ``unknown_error``."""
    data = given if isinstance(given, list | tuple) else _get(given, "data")
    return tuple(
        BatchError(
            redact(_text(_get(error, "code")), secrets) or "unknown_error",
            redact(_get(error, "message"), secrets),
            _count(_get(error, "line")),
        )
        for error in (data if isinstance(data, list | tuple) else ())
    )


def _metadata(given: object) -> dict[str, str]:
    return {str(key): str(value) for key, value in given.items()} if isinstance(given, Mapping) else {}
