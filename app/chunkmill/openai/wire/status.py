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
    """A status that we do not know; the batch may still be running."""

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


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
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended. With any of these statuses either file may be there, and the counts may not add up."""
        return self.status.is_terminal


def remote_batch(given: object, secrets: Sequence[str] = ()) -> RemoteBatch:
    """Read a batch from the client's object or a mapping, without ``secrets``. Raises ValueError if it has no id."""
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
    """The status that is meant; ``Validating``, ``in-progress`` and ``canceled`` are understood too."""
    letters = re.sub("[^a-z]", "", str(getattr(given, "value", given)).lower())
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


def _text(given: object) -> str | None:
    return given if isinstance(given, str) and given else None


def _count(given: object) -> int | None:
    return given if type(given) is int and given >= 0 else None


def _errors(given: object, secrets: Sequence[str]) -> tuple[BatchError, ...]:
    """The errors in a list, or in an object with the list ``data``. One without a code is ``unknown_error``."""
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
