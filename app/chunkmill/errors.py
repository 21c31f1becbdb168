"""Every error that Chunkmill raises on purpose.

Each class has ``code`` (a stable word for logs, metrics and the ledger), ``retryable`` (whether the same call may
succeed later), ``elsewhere`` (whether another worker may succeed) and ``http_status``. Each message says what is wrong,
where, and what to do next. No message contains a chunk's text.
"""

from __future__ import annotations

import functools
from typing import ClassVar


def install_command(extra: str) -> str:
    """The command that installs an extra, for messages.

    It names no package of an index, because nobody owns the name there: whoever registers it would be installed.
    """
    return f"pip install -c constraints.txt '.[{extra}]' (in a checkout; docs/running.md says how with a wheel)"


class ChunkmillError(Exception):
    """The base class of all errors. ``str(error)`` is the whole message, including what to do next.

    Each error has four attributes for programs: ``code``, a stable word for logs, metrics and ``if``; ``retryable``,
    whether the same call may succeed later; ``http_status``, the status with which a gateway answers; and
    ``elsewhere``, whether another worker may succeed. A service may answer its own callers with them::

        try:
            hits = client.search(question, collection="docs")
        except ChunkmillError as error:
            return {"error": error.code, "message": str(error)}, error.http_status
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    elsewhere: ClassVar[bool] = False
    """Whether another worker, with another model, device or setting, may be able to do what this one cannot. A worker
    that meets such an error charges nobody for it, and leaves the work to others for a while."""


@functools.cache
def elsewhere_codes() -> frozenset[str]:
    """The codes of the errors that another worker may not meet. The ledger keeps the code of an error alone."""
    kinds, codes = [ChunkmillError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.elsewhere:
            codes.add(kind.code)
    return frozenset(codes)


class InvalidInput(ChunkmillError):
    """The caller's argument is wrong. Nothing was written."""

    code = "invalid_input"
    http_status = 400


class InvalidChunk(InvalidInput):
    """A chunk that cannot be stored. ``chunk_id`` is its id as it is shown, ``position`` counts from 0 in the iterable
    given to ``enqueue``, and ``reason`` is a stable word for the problem."""

    code = "invalid_chunk"

    def __init__(self, problem: str, *, chunk_id: str, position: int, reason: str, known_id: str | None = None) -> None:
        self.chunk_id = chunk_id
        """The id as it is shown: shortened, and without characters that a log cannot hold."""
        self.known_id = known_id
        """The chunk's whole id, if it has a valid one: then the source has this chunk, although it cannot be stored.
        It may also be the id of a document that cannot be read."""
        self.position = position
        self.reason = reason
        """A stable word for the kind of problem, such as ``empty_id``. It is the ``code`` in the dead list."""
        self.problem = problem
        super().__init__(
            f"chunk {chunk_id!r} at position {position}: {problem}. Nothing was written. Fix the chunk, "
            'or pass on_invalid="skip" to put bad chunks into the job\'s dead list and enqueue the rest.'
        )


class TooManyRefused(InvalidInput):
    """More chunks of an enqueue were refused than ``max_refused`` allows. Nothing was written.

    ``refused`` is how many, of ``chunks`` that the source has; both are None if a gateway said it.
    """

    code = "too_many_refused"

    def __init__(self, message: str, *, refused: int | None = None, chunks: int | None = None) -> None:
        self.refused = refused
        self.chunks = chunks
        super().__init__(message)


class UnknownModel(InvalidInput):
    """The model cannot be found or read."""

    code = "unknown_model"
    elsewhere = True


class UnknownRoute(InvalidInput):
    """The route does not exist."""

    code = "unknown_route"


class InvalidSetting(InvalidInput):
    """An environment variable or a setting is wrong."""

    code = "invalid_setting"
    elsewhere = True


class NotFound(ChunkmillError):
    """The job, the collection, or what else was named does not exist."""

    code = "not_found"
    http_status = 404


class JobFailed(ChunkmillError):
    """The job ended with chunks that have no vector. ``job_id`` is its id. ``client.job(job_id).dead_chunks`` has its
    first dead chunks and their reasons."""

    code = "job_failed"

    def __init__(self, message: str, *, job_id: int) -> None:
        self.job_id = job_id
        super().__init__(message)


class JobCancelled(JobFailed):
    """Somebody cancelled the job while it was waited for, or before. ``client.retry(job_id)`` continues it."""

    code = "job_cancelled"


class WaitTimeout(ChunkmillError):
    """The time given to a call that waits is over."""

    code = "wait_timeout"
    retryable = True
    http_status = 504


class SpaceMismatch(ChunkmillError):
    """Vectors of one space would have been mixed with those of another one."""

    code = "space_mismatch"
    http_status = 409
    elsewhere = True


class NewerSpace(ChunkmillError):
    """A newer release registered the space with fields that this release does not know, so only that one reads it."""

    code = "newer_space"
    http_status = 409
    elsewhere = True


class BudgetExceeded(ChunkmillError):
    """The month's budget for paid routes is used up. The same call succeeds in the next month, or with a higher
    budget."""

    code = "budget_exceeded"
    http_status = 402


class LeaseLost(ChunkmillError):
    """Another worker holds the ChunkBatch now. No client raises it."""

    code = "lease_lost"


class StoreUnavailable(ChunkmillError):
    """Postgres cannot be reached, is not migrated, or has no pgvector."""

    code = "store_unavailable"
    retryable = True
    http_status = 503


class StoreLimit(StoreUnavailable):
    """Postgres ended a transaction because it took more than a setting allows. The message names the setting."""

    code = "store_limit"


class GatewayUnavailable(ChunkmillError):
    """The gateway cannot be reached, is overloaded, or sent an answer that cannot be read. Only the clients of
    ``chunkmill.remote`` raise it, when the time of the call is over."""

    code = "gateway_unavailable"
    retryable = True
    http_status = 503


class AccessDenied(ChunkmillError):
    """The gateway does not know the API key, or the key does not allow the request. The message says which right is
    missing."""

    code = "access_denied"
    http_status = 403


class ClientClosed(ChunkmillError):
    """The client was closed before the call, or while it ran. What the call had committed before stays."""

    code = "client_closed"
    http_status = 503


class EmbeddedStackError(ChunkmillError):
    """The embedded Postgres or Redis cannot run."""

    code = "embedded_stack"


class DeviceUnavailable(ChunkmillError):
    """The requested GPU does not exist, or no device can compute. No client raises it."""

    code = "device_unavailable"
    elsewhere = True


class DeviceTaken(DeviceUnavailable):
    """Each GPU has a worker already; one of them may end soon. No client raises it."""

    code = "device_taken"
    retryable = True


class ProviderError(ChunkmillError):
    """A provider of embeddings did not do what it was asked to do. ``words`` is the provider's own message, without
    keys. It may quote a text, so it is written into the ledger but never into a log. ``brief`` is the message without
    it."""

    code = "provider_error"
    http_status = 502

    def __init__(self, message: str, *, words: str = "", advice: str = "") -> None:
        self.words = words
        self.brief = f"{message}. {advice}" if advice else message
        said = f"{message}: {words}" if words else message
        super().__init__(f"{said} {advice}" if advice else said)


class ProviderBusy(ProviderError):
    """A rate limit was reached, which passes by itself. ``retry_after_s`` is how many seconds the provider asked to
    wait; None if it did not say."""

    code = "provider_busy"
    retryable = True

    def __init__(self, message: str, *, words: str = "", retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, words=words)


class ProviderSilent(ProviderError):
    """There was no answer or a broken one, so the request may have succeeded. ``timed_out`` says that the answer took
    too long, so that a smaller request may get one. ``was_sent`` is false if the request surely never reached the
    provider, so that it cannot have been charged. ``answered`` says that a successful answer had begun, so that the
    request was charged although it is lost."""

    code = "provider_silent"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        words: str = "",
        timed_out: bool = False,
        was_sent: bool = True,
        answered: bool = False,
    ) -> None:
        self.timed_out = timed_out
        self.was_sent = was_sent
        self.answered = answered
        super().__init__(message, words=words)


class ProviderRefused(ProviderError):
    """The provider refused, and will always refuse the same request. ``status`` is the HTTP status, and
    ``provider_code`` the provider's own code."""

    code = "provider_refused"

    def __init__(self, message: str, *, status: int, provider_code: str, words: str = "") -> None:
        self.status = status
        self.provider_code = provider_code
        super().__init__(message, words=words)


class ProviderStopped(ProviderError):
    """The provider accepts nothing until somebody pays, or fixes the key or a setting. ``provider_code`` says which,
    such as ``insufficient_quota`` or ``model_not_found``."""

    code = "provider_stopped"

    def __init__(self, message: str, *, provider_code: str, words: str = "", advice: str = "") -> None:
        self.provider_code = provider_code
        super().__init__(message, words=words, advice=advice)


class EngineError(ChunkmillError):
    """The model could not be loaded or run."""

    code = "engine_error"
    retryable = True


class ModelLoadError(EngineError):
    """A file of the model is missing, cannot be read, or is of a kind that is not supported."""

    code = "model_load"
    elsewhere = True


class DeviceFailed(EngineError):
    """The device no longer computes even a text that worked before. No client raises it."""

    code = "device_failed"


class TokenizerMismatch(EngineError):
    """The tokenizer was not made for this model. No client raises it."""

    code = "tokenizer_mismatch"
    retryable = False


class CanaryFailed(EngineError):
    """The vectors of the golden texts differ too much from the space's reference. No client raises it."""

    code = "canary_failed"
    retryable = False
    elsewhere = True
