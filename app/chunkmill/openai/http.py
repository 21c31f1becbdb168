"""The provider over HTTP, through the official client. Each call is sent once; the ledger decides whether to retry.

(The client's own retries would send ``POST /batches`` three times on a timeout, without an idempotency key.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, TypeVar

from chunkmill.errors import (
    InvalidSetting,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
    install_command,
)
from chunkmill.openai.counted import counted
from chunkmill.openai.wire.jsonl import URL, split_lines
from chunkmill.openai.wire.redaction import redact
from chunkmill.openai.wire.status import RemoteBatch, remote_batch
from chunkmill.settings import Settings
from chunkmill.settings.provider import DEFAULT_BASE_URL

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

TOKEN_KEY = "chunkmill"  # noqa: S105 - the word under which a batch's metadata has its token
LISTED_PAGES = 20
"""Pages of 100 batches that `find` reads at most: two hours of batches at the rate that OpenAI allows."""
FILE_EXPIRES_S = 30 * 24 * 3600
STOP_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "account_deactivated"})


class Provider:
    """One server and one key. Safe to use from several threads.

    Calls raise the kinds of ``ProviderError``, whose messages are safe to show, and are counted in the metrics. A list
    of several pages counts as one request, and a download lasts until its lines are read.
    """

    def __init__(self, settings: Settings) -> None:
        try:
            import openai
        except ImportError:
            raise InvalidSetting(f"the paid routes need the package openai. Run: {install_command('openai')}") from None
        if settings.openai_api_key is None:
            raise InvalidSetting(
                "OPENAI_API_KEY is not set, and a worker on queue `openai` needs it. Set it and start the worker again."
            )
        self.server = settings.openai_base_url or DEFAULT_BASE_URL
        key = settings.openai_api_key.get_secret_value()
        self.secrets = (key,)
        self._openai = openai
        try:
            self._client = openai.OpenAI(
                api_key=key, base_url=self.server, max_retries=0, timeout=settings.openai_timeout_seconds
            )
        except (ImportError, OSError, ValueError) as error:
            # The HTTP library reads the proxies and the certificates when a client is made. Its message may quote a
            # proxy with its password.
            raise InvalidSetting(
                f"no connection to {self.server} can be made with the environment of this process "
                f"({type(error).__name__}). Check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY (a SOCKS proxy needs "
                "the package socksio), and that the files of SSL_CERT_FILE and SSL_CERT_DIR exist."
            ) from None

    def close(self) -> None:
        self._client.close()

    @counted("upload")
    def upload(self, name: str, file: IO[bytes]) -> str:
        """Upload the input file of a batch and return its id. It expires by itself if nobody deletes it."""
        made = self._call(
            lambda: self._client.files.create(
                file=(name, file, "application/jsonl"),
                purpose="batch",
                expires_after={"anchor": "created_at", "seconds": FILE_EXPIRES_S},
            )
        )
        if not getattr(made, "id", None):
            raise ProviderSilent(f"{self.server} accepted a file and did not return its id.")
        return str(made.id)

    @counted("create")
    def create(self, input_file_id: str, token: str) -> RemoteBatch:
        """Create a batch. After :class:`ProviderSilent` it may exist, which ``find`` tells."""
        return self._batch(
            lambda: self._client.batches.create(
                input_file_id=input_file_id,
                endpoint=URL,
                completion_window="24h",
                metadata={TOKEN_KEY: token},
            )
        )

    @counted("retrieve")
    def retrieve(self, batch_id: str) -> RemoteBatch:
        return self._batch(lambda: self._client.batches.retrieve(batch_id))

    @counted("cancel")
    def cancel(self, batch_id: str) -> RemoteBatch:
        return self._batch(lambda: self._client.batches.cancel(batch_id))

    @counted("list")
    def find(self, input_file_id: str, token: str, *, since: datetime) -> list[RemoteBatch]:
        """All batches of an input file or with our token, the oldest first.

        The provider's list cannot be filtered, so its pages are read until all batches of one are older than ``since``.
        """

        def read_pages() -> list[RemoteBatch]:
            ours: dict[str, RemoteBatch] = {}
            page = self._client.batches.list(limit=100)
            for _ in range(LISTED_PAGES):
                batches = []
                for item in page.data:
                    with contextlib.suppress(ValueError):
                        batches.append(remote_batch(item, self.secrets))
                for batch in batches:
                    if batch.input_file_id == input_file_id or batch.metadata.get(TOKEN_KEY) == token:
                        ours[batch.id] = batch
                old = [batch for batch in batches if batch.created_at is not None and batch.created_at < since]
                if len(old) == len(batches) or not page.has_next_page():
                    break
                page = page.get_next_page()
            return list(ours.values())

        batches = self._call(read_pages)
        return sorted(batches, key=lambda batch: (batch.created_at is None, batch.created_at, batch.id))

    @contextlib.contextmanager
    def lines(self, file_id: str) -> Iterator[Iterator[bytes]]:
        """The lines of a file as they arrive. A download that ends early raises :class:`ProviderSilent` in mid-file."""
        with counted("download"), contextlib.ExitStack() as stack:
            with self._errors():
                response = stack.enter_context(self._client.files.with_streaming_response.content(file_id))
            yield self._guarded(split_lines(response.iter_bytes(1 << 20)))

    def _guarded(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        with self._errors():
            yield from lines

    @counted("delete")
    def delete_file(self, file_id: str) -> None:
        """Delete a file. It is not an error if the file does not exist any more."""
        try:
            self._call(lambda: self._client.files.delete(file_id))
        except ProviderRefused as refused:
            if refused.status != 404:
                raise

    @counted("list")
    def files_named(self, prefix: str, *, limit: int = 1000) -> list[str]:
        """Ids of those of the newest ``limit`` uploaded files whose names begin with ``prefix``."""

        def read_list() -> list[str]:
            ids = []
            for n, file in enumerate(self._client.files.list(purpose="batch", order="desc")):
                if n == limit:
                    break
                if str(getattr(file, "filename", "")).startswith(prefix):
                    ids.append(str(file.id))
            return ids

        return self._call(read_list)

    @counted("embed")
    def embed(
        self, model: str, inputs: Sequence[str], *, dimensions: int | None, idempotency_key: str
    ) -> dict[str, Any]:
        """The body of the answer to a plain request. OpenAI ignores ``idempotency_key``; some other servers know it."""

        def ask() -> bytes:
            extra: dict[str, Any] = {} if dimensions is None else {"dimensions": dimensions}
            answer = self._client.embeddings.with_raw_response.create(
                model=model,
                input=list(inputs),
                encoding_format="base64",
                extra_headers={"Idempotency-Key": idempotency_key},
                **extra,
            )
            return bytes(answer.content)

        body = self._call(ask)
        try:
            parsed = json.loads(body)
        except ValueError:
            raise ProviderSilent(
                f"{self.server} answered an embeddings request with something that is not JSON."
            ) from None
        if not isinstance(parsed, dict):
            raise ProviderSilent(f"{self.server} answered an embeddings request with something that is not an object.")
        return parsed

    def _batch(self, ask: Callable[[], object]) -> RemoteBatch:
        given = self._call(ask)
        try:
            return remote_batch(given, self.secrets)
        except ValueError as error:
            raise ProviderSilent(f"{self.server} answered with something that is not a batch: {error}") from None

    def _call(self, ask: Callable[[], T]) -> T:
        with self._errors():
            try:
                return ask()
            except (AttributeError, TypeError, ValueError) as error:
                # The client does not check answers, and fails on one that is not JSON or not an object.
                raise ProviderSilent(
                    f"{self.server} gave an answer of an unexpected kind", words=self._redact(error)
                ) from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises the client's errors as our own, and not ``from`` them, because their texts may hold the key."""
        openai = self._openai
        try:
            yield
        except ProviderError:
            raise
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APITimeoutError:
            raise ProviderSilent(f"{self.server} did not answer in time (OPENAI_TIMEOUT_SECONDS).") from None
        except openai.APIConnectionError as error:
            raise ProviderSilent(f"{self.server} could not be reached, or hung up: {self._why(error)}") from None
        except openai.OpenAIError as error:
            raise ProviderSilent(f"{self.server}: {type(error).__name__}", words=self._redact(error)) from None
        except _transport_errors() as error:
            raise ProviderSilent(f"{self.server} broke off its answer: {type(error).__name__}") from None

    def _refusal(self, error: openai.APIStatusError) -> ProviderError:
        status, code = error.status_code, str(error.code or f"http_{error.status_code}")
        said, words = f"{self.server} answered {status} {code[:60]}", self._redact(error.message)
        if code in STOP_CODES or str(error.type) in STOP_CODES:
            advice = "Pay or raise the limit, then: chunkmill lanes resume"
            return ProviderStopped(said, words=words, advice=advice, provider_code=code)
        if status in (401, 403):
            advice = "Fix OPENAI_API_KEY, then: chunkmill lanes resume"
            return ProviderStopped(said, words=words, advice=advice, provider_code=code)
        if status == 429 or code == "token_limit_exceeded":
            return ProviderBusy(said, words=words, retry_after_s=_retry_after(error.response.headers))
        if status >= 500 or status in (408, 409):
            return ProviderSilent(said, words=words)
        return ProviderRefused(said, words=words, status=status, provider_code=code)

    def _redact(self, message: object) -> str:
        return redact(message, self.secrets)

    def _why(self, error: BaseException) -> str:
        return type(error.__cause__ or error).__name__


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library below the client raises in the middle of a body, where the client does not handle it.

    openai 3 uses httpx2, and openai 2 uses httpx.
    """
    httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    return (httpx.HTTPError, httpx.StreamError, OSError)


def _retry_after(headers: Any) -> float | None:
    """Seconds from ``retry-after-ms`` or ``retry-after``; None if it is a date, which we do not read, or nonsense."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(headers.get(name)) * scale
            if 0 <= seconds < 24 * 3600:
                return seconds
    return None
