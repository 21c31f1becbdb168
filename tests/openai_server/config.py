"""What the server can be told, at its start and while it runs. Limits are OpenAI's documented ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

DEFAULT_KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyz"
DEFAULT_MODEL = "text-embedding-3-small"


@dataclass
class Config:
    # What it serves.
    models: dict[str, int] = field(
        default_factory=lambda: {
            "text-embedding-3-small": 1536,
            "text-embedding-3-large": 3072,
            "text-embedding-ada-002": 1536,
        }
    )
    """Name to full dimensions. ``dimensions`` in a request is refused for a model named ``*ada*``."""
    batches: bool = True
    """False: every ``/batches`` address is a 404, as on servers without the Batch API."""
    fast_tokens: bool = False
    """Count ``len(utf8) // 4 + 1`` tokens in place of cl100k's."""
    base64: bool = True
    """False: a request for base64 is refused, as by some compatible servers."""
    counts_characters: bool = False
    """The ``usage`` of an answer counts characters, as Infinity's does. The bill counts tokens all the same."""
    max_request_bytes: int | None = None
    """Of a plain request's body. A larger one is refused with a 413, as by a proxy in front of the server."""
    other_keys: list[str] = field(default_factory=list)
    """Keys of other projects: what one project made is not found with the key of another."""
    counts_batches: bool = False
    """Batches are called batch_1, batch_2 and so on since the server last forgot everything."""
    file_expiry: bool = True
    """False: ``expires_after`` of a file is an unknown parameter."""
    too_large_status: int = 400
    """How a file of more than ``max_file_bytes`` is refused: 400, or a gateway's 413 with a page of HTML."""
    request_errors: str = "line"
    """Where a well-formed line's bad request shows: "line", a 400 in the error file; "batch", validation fails."""

    # Limits of one file, batch and request.
    max_file_bytes: int = 200_000_000
    max_lines: int = 50_000
    max_inputs_per_batch: int = 50_000
    max_inputs_per_request: int = 2_048
    max_tokens_per_input: int = 8_192
    max_tokens_per_request: int = 300_000

    # Limits of the organisation. None: no limit.
    enqueued_tokens: int | None = None
    """Per model, over all batches that have not ended."""
    enqueued_requests: int | None = 1_000_000
    """Lines per model, over all batches that have not ended."""
    enqueued_overflow: str = "batch"
    """How the two above are refused: "batch", validation fails; "create", a 429 on create."""
    batches_per_hour: int | None = 2_000
    requests_per_minute: int | None = None
    """Of ``/embeddings``, per model."""
    tokens_per_minute: int | None = None
    rate_window_seconds: float = 60.0
    """What "per minute" lasts; shorter, so that a test need not wait."""

    # A batch's life.
    driver: str = "time"
    """What moves a batch on: "time", the seconds below; "gets", every ``gets_per_step`` retrievals of it."""
    gets_per_step: int = 1
    validating_seconds: float = 0.0
    in_progress_seconds: float = 0.0
    finalizing_seconds: float = 0.0
    cancelling_seconds: float = 0.0
    window_seconds: float = 86_400.0
    """Still in progress that long after its creation, a batch expires."""
    partial_fraction: float = 0.5
    """How much of a batch is executed when it expires or is cancelled in progress."""

    # Weaknesses that last.
    slow_above_inputs: int | None = None
    """A plain request with more inputs is carried out and charged, and a gateway answers 504 in place of it."""
    breaks_at: str | None = None
    """A plain request with a text that holds this is answered 500, and costs nothing."""
    list_lag_seconds: float = 0.0
    """A new batch shows up in the list of batches that late."""
    clock_behind_seconds: float = 0.0
    """So far behind is the clock that it shows in the ``created_at`` of a batch."""
    files_lag_seconds: float = 0.0
    """A new file shows up in the list of files that late."""
    delays: dict[str, float] = field(default_factory=dict)
    """Endpoint (or ``*``) to the seconds every answer of it takes longer."""
    seed: int = 0
    """Of the order of the output's lines."""

    def update(self, changes: dict[str, Any]) -> None:
        known = {field.name for field in fields(self)}
        if unknown := set(changes) - known:
            raise ValueError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
        for name, allowed in CHOICES.items():
            if changes.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}")
        for name, value in changes.items():
            setattr(self, name, value)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


CHOICES = {
    "request_errors": ("line", "batch"),
    "enqueued_overflow": ("batch", "create"),
    "driver": ("time", "gets"),
}
