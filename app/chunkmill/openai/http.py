"""The provider over HTTP, through the official client. Each call is sent once; the ledger decides whether to retry.

(The client's own retries would send ``POST /batches`` three times on a timeout, without an idempotency key.)
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from chunkmill.domain.providers import Encoding
from chunkmill.errors import (
    InvalidSetting,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
    install_command,
)
from chunkmill.openai.bounded import LONGEST_ANSWER, SLOWEST_BYTES_PER_S, Bounds, http_client, library, within
from chunkmill.openai.counted import counted
from chunkmill.openai.plan.refusals import Meaning, refusal
from chunkmill.openai.wire.answers import LengthLimits, error_of, parse_object
from chunkmill.openai.wire.bounds import identifier
from chunkmill.openai.wire.jsonl import URL, split_lines
from chunkmill.openai.wire.redaction import redact
from chunkmill.openai.wire.status import RemoteBatch, belongs_to, remote_batch
from chunkmill.settings import Settings
from chunkmill.settings.provider import DEFAULT_BASE_URL

if TYPE_CHECKING:
    from types import ModuleType

    import openai

T = TypeVar("T")

logger = logging.getLogger(__name__)

TOKEN_KEY = "chunkmill"  # noqa: S105 - the word under which a batch's metadata has its token
LISTED_PAGES = 20
"""Pages of 100 batches that `find` reads at most: two hours of batches at the rate that OpenAI allows."""
PIECE = 64 * 1024
"""Bytes of a download that are read at a time."""
FILE_EXPIRES_S = 30 * 24 * 3600
_TIMEOUTS = frozenset({408, 504, 524})
"""Statuses with which a gateway says that the server behind it took too long."""
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"})
"""What the HTTP library raises before a request is sent, by the name of the class."""


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
        settings.require_provider()
        if settings.openai_api_key is None:
            raise InvalidSetting(
                "OPENAI_API_KEY is not set, and a worker on queue `openai` needs it. Set it and start the worker again."
            )
        self._models = settings.provider_models
        self._floats: set[str] = set()
        base_url = urlsplit(settings.openai_base_url or DEFAULT_BASE_URL)
        self.server = base_url._replace(query="").geturl()
        """The address without its query, by which the ledger knows the server."""
        query = dict(parse_qsl(base_url.query))
        key = settings.openai_api_key.get_secret_value()
        self.secrets = (key,)
        self.key_digest = hashlib.sha256(f"{self.server}\n{key}".encode()).hexdigest()[:16]
        """Tells one key from another. With the key of another project the provider does not find our batches."""
        self._expires = True
        self._openai = openai
        self._timeout_s = timeout = settings.openai_timeout_seconds
        try:
            self._client = openai.OpenAI(
                api_key=key,
                base_url=self.server,
                max_retries=0,
                timeout=timeout,
                default_query=query,
                # Addresses with an api-version are Azure's, which reads a key from this header only.
                default_headers={"api-key": key} if query else {},
                # A proxy of the environment would read what goes to a private host by http, with the key.
                http_client=http_client(openai, self.server, timeout, is_https=base_url.scheme == "https"),
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

    def encoding(self, model: str) -> Encoding:
        """In which form vectors of the model are asked for: as OPENAI_MODELS says, or as this process has learnt."""
        described = self._models.get(model)
        if described is not None and described.encoding is not None:
            return described.encoding
        return "float" if model in self._floats else "base64"

    @counted("upload")
    def upload(self, name: str, file: IO[bytes]) -> str:
        """Upload the input file of a batch and return its id. It expires by itself if nobody deletes it.

        A server that does not know ``expires_after`` gets the file without it, and keeps it until it is deleted.
        """
        bounds = Bounds(self._timeout_s + file.seek(0, 2) / SLOWEST_BYTES_PER_S)

        def send() -> Any:
            file.seek(0)
            expiry: dict[str, Any] = {"anchor": "created_at", "seconds": FILE_EXPIRES_S}
            more: dict[str, Any] = {"expires_after": expiry} if self._expires else {}
            return self._client.files.create(file=(name, file, "application/jsonl"), purpose="batch", **more)

        try:
            made = self._call(send, bounds=bounds, of_all=True)
        except (ProviderRefused, ProviderStopped) as refused:
            if not self._expires or "expires_after" not in str(refused).lower():
                raise
            self._expires = False
            made = self._call(send, bounds=bounds, of_all=True)
        try:
            file_id = identifier("id", getattr(made, "id", None), self.secrets)
        except ValueError as error:
            raise ProviderSilent(f"{self.server} accepted a file and returned {error}") from None
        if file_id is None:
            raise ProviderSilent(f"{self.server} accepted a file and did not return its id.")
        return file_id

    @counted("create")
    def create(self, input_file_id: str, token: str) -> RemoteBatch:
        """Create a batch. After :class:`ProviderSilent` it may exist, which ``find`` tells."""
        return self._batch(
            lambda: self._client.batches.create(
                input_file_id=input_file_id,
                endpoint=URL,
                completion_window="24h",
                metadata={TOKEN_KEY: token},
            ),
            of_all=True,
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
            with within(Bounds(self._timeout_s)):
                page = self._client.batches.list(limit=100)
            for _ in range(LISTED_PAGES):
                batches = []
                for item in page.data:
                    is_ours = belongs_to(item, input_file_id, (TOKEN_KEY, token))
                    try:
                        batch = remote_batch(item, self.secrets)
                    except ValueError:
                        if is_ours:
                            raise  # a batch of ours that is passed over would be created, and paid for, again
                        continue
                    batches.append(batch)
                    if is_ours:
                        ours[batch.id] = batch
                old = [batch for batch in batches if batch.created_at is not None and batch.created_at < since]
                if len(old) == len(batches) or not page.has_next_page():
                    break
                with within(Bounds(self._timeout_s)):
                    page = page.get_next_page()
            return list(ours.values())

        batches = self._call(read_pages)
        return sorted(batches, key=lambda batch: (batch.created_at is None, batch.created_at, batch.id))

    @contextlib.contextmanager
    def lines(self, file_id: str, longest: LengthLimits) -> Iterator[Iterator[bytes]]:
        """The lines of a file as they arrive, with ``TOO_LONG`` in place of each that is longer than ``longest.line``.

        A download that ends early, is too slow or is longer than ``longest.file`` raises :class:`ProviderSilent` in
        mid-file.
        """
        bounds = Bounds(self._timeout_s, longest.file)
        with counted("download"), contextlib.ExitStack() as stack:
            with self._errors(), within(bounds):
                response = stack.enter_context(self._client.files.with_streaming_response.content(file_id))
            yield split_lines(self._pieces(response.iter_bytes(PIECE), bounds), longest.line)

    def _pieces(self, pieces: Iterator[bytes], bounds: Bounds) -> Iterator[bytes]:
        """The pieces of a download. Only the time that is spent in waiting for them is taken from ``bounds``."""
        while True:
            with self._errors(), within(bounds):
                piece = next(pieces, None)
            if piece is None:
                return
            bounds.seconds += len(piece) / SLOWEST_BYTES_PER_S
            yield piece

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
        self,
        model: str,
        inputs: Sequence[str],
        *,
        dimensions: int | None,
        idempotency_key: str,
        longest: int = LONGEST_ANSWER,
    ) -> dict[str, Any]:
        """The body of the answer to a plain request, of ``longest`` bytes at most.

        OpenAI ignores ``idempotency_key``; some other servers know it. A server that refuses base64 is asked again for
        floats, which costs nothing, and from then on at once. An error in a successful answer is raised like one with a
        status of its own.
        """
        bounds = Bounds(self._timeout_s, longest)

        def ask_for(encoding: Encoding) -> dict[str, Any]:
            extra: dict[str, Any] = {} if dimensions is None else {"dimensions": dimensions}
            answer = self._client.embeddings.with_raw_response.create(
                model=model,
                input=list(inputs),
                encoding_format=encoding,
                extra_headers={"Idempotency-Key": idempotency_key},
                **extra,
            )
            parsed = parse_object(answer.content, self.server)
            if (error := error_of(parsed)) is not None:
                raise self._error_in(answer.http_response, error)
            return parsed

        def ask() -> dict[str, Any]:
            encoding = self.encoding(model)
            try:
                return ask_for(encoding)
            except self._openai.APIStatusError as error:
                described = self._models.get(model)
                is_told = described is not None and described.encoding is not None
                if encoding == "float" or is_told or not _refuses_base64(error):
                    raise
            body = ask_for("float")
            self._floats.add(model)
            logger.info("%s refuses base64 for model %s: it is asked for floats from now on", self.server, model)
            return body

        try:
            return self._call(ask, bounds=bounds, of_all=True)
        except ProviderSilent as silent:
            silent.answered = silent.answered or (bounds.status or 500) < 300
            raise

    def _error_in(self, response: Any, error: dict[str, Any]) -> openai.APIStatusError:
        """The error that stands in a successful answer. Some routers put the status of the server behind them there."""
        said = self._openai.APIStatusError(error["message"], response=response, body=error)
        if isinstance(code := error["code"], int):
            said.status_code = code
        return said

    def _batch(self, ask: Callable[[], object], *, of_all: bool = False) -> RemoteBatch:
        given = self._call(ask, of_all=of_all)
        try:
            return remote_batch(given, self.secrets)
        except ValueError as error:
            raise ProviderSilent(f"{self.server} answered with something that is not a batch: {error}") from None

    def _call(self, ask: Callable[[], T], *, bounds: Bounds | None = None, of_all: bool = False) -> T:
        with self._errors(of_all=of_all), within(bounds or Bounds(self._timeout_s)):
            try:
                return ask()
            except (AttributeError, RecursionError, TypeError, ValueError) as error:
                # The client does not check answers, and fails on one that is not JSON or not an object.
                raise ProviderSilent(
                    f"{self.server} gave an answer of an unexpected kind", words=self._redact(error)
                ) from None

    @contextlib.contextmanager
    def _errors(self, *, of_all: bool = False) -> Iterator[None]:
        """Raises the client's errors as our own, and not ``from`` them, because their texts may hold the key.

        ``of_all`` is true for calls that every piece of work needs: a 404 there concerns everybody.
        """
        openai = self._openai
        try:
            yield
        except ProviderError:
            raise
        except openai.APIStatusError as error:
            raise self._refusal(error, of_all=of_all) from None
        except openai.APITimeoutError as error:
            raise ProviderSilent(
                f"{self.server} did not answer in time (OPENAI_TIMEOUT_SECONDS).",
                timed_out=True,
                was_sent=self._why(error) not in _NOT_SENT,
            ) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, ProviderError):  # openai 2 wraps what `bounded` raises
                raise error.__cause__ from None
            raise ProviderSilent(
                f"{self.server} could not be reached, or hung up: {self._why(error)}",
                was_sent=self._why(error) not in _NOT_SENT,
            ) from None
        except openai.OpenAIError as error:
            raise ProviderSilent(f"{self.server}: {type(error).__name__}", words=self._redact(error)) from None
        except _transport_errors(openai) as error:
            if "Timeout" in type(error).__name__:
                raise ProviderSilent(
                    f"{self.server} did not answer in time (OPENAI_TIMEOUT_SECONDS).", timed_out=True
                ) from None
            raise ProviderSilent(f"{self.server} broke off its answer: {type(error).__name__}") from None

    def _refusal(self, error: openai.APIStatusError, *, of_all: bool) -> ProviderError:
        status, words = error.status_code, self._redact(error.message)
        code, kind = _word(self._redact(error.code)), _word(self._redact(error.type))
        told = refusal(status, code, words, kind=kind, parameter=str(error.param or ""), of_all=of_all)
        code = code or (kind if told.meaning is Meaning.STOP and kind else f"http_{status}")
        said = f"{self.server} answered {status} {code[:60]}"
        match told.meaning:
            case Meaning.STOP:
                return ProviderStopped(said, words=words, advice=told.advice, provider_code=code)
            case Meaning.WAIT:
                return ProviderBusy(said, words=words, retry_after_s=_retry_after(error.response.headers))
            case Meaning.OUTAGE:
                # A router that answers an error with 200 has computed nothing.
                return ProviderSilent(said, words=words, timed_out=status in _TIMEOUTS, was_sent=status >= 300)
            case Meaning.NOT_RUN | Meaning.SIZE | Meaning.TEXT:
                return ProviderRefused(said, words=words, status=status, provider_code=code)

    def _redact(self, message: object) -> str:
        return redact(message, self.secrets)

    def _why(self, error: BaseException) -> str:
        return type(error.__cause__ or error).__name__


def _refuses_base64(error: openai.APIStatusError) -> bool:
    """Whether a refusal may be about the encoding. A text may hold the same words, so only a second try is proof."""
    said = f"{error.message} {error.param} {error.body}".lower()
    return (400 <= error.status_code < 500 or error.status_code == 501) and (
        "base64" in said or "encoding_format" in said
    )


def _word(given: object) -> str:
    """A code or a type of an error, in the provider's word; empty if there is none, or only the status as a number."""
    return given if isinstance(given, str) and not given.isdigit() else ""


def _transport_errors(openai: ModuleType) -> tuple[type[Exception], ...]:
    """What the HTTP library below the client raises in the middle of a body, where the client does not handle it."""
    httpx = library(openai)
    return (httpx.HTTPError, httpx.StreamError, OSError)


def _retry_after(headers: Any) -> float | None:
    """Seconds from ``retry-after-ms`` or ``retry-after``; None if it is a date, which we do not read, or nonsense."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(headers.get(name)) * scale
            if 0 <= seconds < 24 * 3600:
                return seconds
    return None
