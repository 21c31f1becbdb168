"""The words of the Batch API that gateways serve. A served batch is a job; docs/gateway.md describes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from chunkmill.domain.states import Priority, Route

MAX_LINES: Final = 50_000
"""The most lines of a file, and the most inputs of all lines together, as OpenAI has them."""
MAX_FILE_BYTES: Final = 200_000_000
MAX_LINE_BYTES: Final = 32 * 1024 * 1024
"""The most bytes of a line, which is read into memory. It is what the body of a plain request may have."""
MAX_INPUTS: Final = 2_048
"""The most inputs of a line."""
FILE_SECONDS: Final = 30 * 24 * 3600
"""How long a file is kept if nothing else is asked for."""
_WINDOW = re.compile(r"([1-9][0-9]{0,2})([hd])", re.ASCII)


class FileKind(StrEnum):
    """What a file is."""

    INPUT = "input"
    OUTPUT = "output"
    ERROR = "error"

    @property
    def purpose(self) -> str:
        """The word of the API."""
        return "batch" if self is FileKind.INPUT else "batch_output"


class ServedState(StrEnum):
    """The state of a served batch, in OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing changes it any more."""
        return self in (ServedState.FAILED, ServedState.COMPLETED, ServedState.EXPIRED, ServedState.CANCELLED)


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """What the request that made a batch asked for. ``seconds`` are those of ``window``, such as ``24h``."""

    endpoint: str
    window: str
    seconds: int
    metadata: dict[str, str] | None
    output_seconds: int
    """How long after their creation the output and the error file are kept."""
    route: Route = Route.AUTO
    priority: Priority = Priority.NORMAL


def window_seconds(window: str) -> int | None:
    """The seconds of a completion window, from ``1h`` to ``7d``; None if it is not one."""
    match = _WINDOW.fullmatch(window)
    if match is None:
        return None
    length = timedelta(hours=int(match[1])) if match[2] == "h" else timedelta(days=int(match[1]))
    return int(length.total_seconds()) if length <= timedelta(days=7) else None


def chunk_id(line: int, position: int) -> str:
    """The id of the chunk of an input. All have the same length, so that they are in order in any collation."""
    return f"{line:06d}-{position:06d}"


def position_of(chunk: str) -> tuple[int, int]:
    """``(line, position)`` of a :func:`chunk_id`."""
    return int(chunk[:6]), int(chunk[7:])
