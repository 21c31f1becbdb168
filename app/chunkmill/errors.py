"""Every error Chunkmill raises on purpose.

::

    ChunkmillError
    ├── InvalidInput          the caller's argument is wrong; nothing was written
    │   ├── InvalidChunk        one chunk, named by its id and position
    │   ├── UnknownModel        the model cannot be found or read
    │   ├── UnknownRoute        the route does not exist
    │   └── InvalidSetting      an environment variable or argument of the set-up
    ├── NotFound              a job or collection that does not exist
    ├── JobFailed             a job ended with chunks that have no vector
    ├── WaitTimeout           the time given to `wait` or `embed` is over
    ├── SpaceMismatch         vectors of one space were about to meet another space
    ├── BudgetExceeded        the month's budget for paid routes is used up
    ├── LeaseLost             another worker holds the ChunkBatch now
    ├── StoreUnavailable      Postgres cannot be used as it is (down, not migrated, no pgvector)
    ├── EmbeddedStackError    the embedded Postgres or Redis cannot run
    ├── DeviceUnavailable     the GPU asked for does not exist, or nothing can compute here
    │   └── DeviceTaken         every GPU has a worker, which may be about to leave
    ├── ProviderAnswerBad     a provider answered a text without a usable vector
    ├── ProviderError         a provider of embeddings did not do what it was asked
    │   ├── ProviderBusy        a limit, which passes by itself
    │   ├── ProviderSilent      no answer, or a broken one: it may have done it
    │   ├── ProviderRefused     it will not do this, however often it is asked
    │   └── ProviderStopped     it will do nothing until somebody pays or mends the key
    └── EngineError           the model could not be loaded or run
        ├── ModelLoadError      files missing, unreadable or of an unsupported kind
        ├── DeviceFailed        the device runs nothing any more, not even a known good text
        ├── TokenizerMismatch   the tokenizer was not made for this model
        └── CanaryFailed        the engine's golden vectors are not the space's: it drifts, and takes no work of it

Each class carries ``code`` (a stable word for logs, metrics and the ledger), ``retryable`` (would the same call succeed
later, unchanged?), ``elsewhere`` (may another worker succeed?) and ``http_status``. Each message says what was wrong,
where, and what to do next. No message contains a chunk's text.
"""

from __future__ import annotations

from typing import ClassVar


class ChunkmillError(Exception):
    """Base of the tree. ``str(error)`` is the whole message, what to do next included."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    elsewhere: ClassVar[bool] = False
    """Whether another worker may be able to do what this one cannot: it has another model, device or setting."""


class InvalidInput(ChunkmillError):
    code = "invalid_input"
    http_status = 400
    elsewhere = True


class InvalidChunk(InvalidInput):
    """A chunk that cannot be stored. ``position`` counts from 0 in the iterable given to ``enqueue``."""

    code = "invalid_chunk"

    def __init__(self, problem: str, *, chunk_id: str, position: int, reason: str) -> None:
        self.chunk_id = chunk_id
        self.position = position
        self.reason = reason
        """A stable word for the kind of problem, such as ``empty_id``; the dead list's ``code``."""
        self.problem = problem
        super().__init__(
            f"chunk {chunk_id!r} at position {position}: {problem}. Nothing was written; mend the chunk, "
            'or pass on_invalid="skip" to put bad chunks into the job\'s dead list and enqueue the rest.'
        )


class UnknownModel(InvalidInput):
    code = "unknown_model"


class UnknownRoute(InvalidInput):
    code = "unknown_route"


class InvalidSetting(InvalidInput):
    code = "invalid_setting"


class NotFound(ChunkmillError):
    code = "not_found"
    http_status = 404
    elsewhere = True


class JobFailed(ChunkmillError):
    """``job_id`` names the job; ``client.job(job_id).dead_chunks`` holds its first dead chunks with their reasons."""

    code = "job_failed"

    def __init__(self, message: str, *, job_id: int) -> None:
        self.job_id = job_id
        super().__init__(message)


class WaitTimeout(ChunkmillError):
    code = "wait_timeout"
    retryable = True
    http_status = 504


class SpaceMismatch(ChunkmillError):
    code = "space_mismatch"
    http_status = 409
    elsewhere = True


class BudgetExceeded(ChunkmillError):
    """The same call succeeds in the next month, or under a higher limit."""

    code = "budget_exceeded"
    http_status = 402
    elsewhere = True


class LeaseLost(ChunkmillError):
    code = "lease_lost"


class StoreUnavailable(ChunkmillError):
    code = "store_unavailable"
    retryable = True
    http_status = 503


class EmbeddedStackError(ChunkmillError):
    code = "embedded_stack"


class DeviceUnavailable(ChunkmillError):
    code = "device_unavailable"


class DeviceTaken(DeviceUnavailable):
    code = "device_taken"
    retryable = True


class ProviderAnswerBad(ChunkmillError):
    code = "bad_vector"
    retryable = True
    http_status = 502


class ProviderError(ChunkmillError):
    """``words`` are the provider's own, without keys. They may repeat a text, so they go into the ledger and never into
    a log: ``brief`` is the message without them."""

    code = "provider_error"
    http_status = 502

    def __init__(self, message: str, *, words: str = "", advice: str = "") -> None:
        self.brief = f"{message}. {advice}" if advice else message
        said = f"{message}: {words}" if words else message
        super().__init__(f"{said} {advice}" if advice else said)


class ProviderBusy(ProviderError):
    """``retry_after_s``: what it asked for, None if it did not say."""

    code = "provider_busy"
    retryable = True

    def __init__(self, message: str, *, words: str = "", retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, words=words)


class ProviderSilent(ProviderError):
    code = "provider_silent"
    retryable = True


class ProviderRefused(ProviderError):
    """``status`` is HTTP's, ``provider_code`` the provider's word for it."""

    code = "provider_refused"

    def __init__(self, message: str, *, status: int, provider_code: str, words: str = "") -> None:
        self.status = status
        self.provider_code = provider_code
        super().__init__(message, words=words)


class ProviderStopped(ProviderError):
    """``provider_code`` is ``insufficient_quota``, or says what is wrong with the key."""

    code = "provider_stopped"

    def __init__(self, message: str, *, provider_code: str, words: str = "", advice: str = "") -> None:
        self.provider_code = provider_code
        super().__init__(message, words=words, advice=advice)


class EngineError(ChunkmillError):
    code = "engine_error"
    retryable = True


class ModelLoadError(EngineError):
    code = "model_load"


class DeviceFailed(EngineError):
    code = "device_failed"


class TokenizerMismatch(EngineError):
    code = "tokenizer_mismatch"
    retryable = False


class CanaryFailed(EngineError):
    code = "canary_failed"
    retryable = False
