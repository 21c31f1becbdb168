"""Configures logging: one line for each event, as text on a terminal and as JSON in a pipe.

No message and no field may contain a text or a secret; ids and counts are enough. We cannot promise that for other
libraries, so their errors are written without the rows that Postgres quotes, and URLs without passwords.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from types import MappingProxyType, TracebackType
from typing import Any, Literal

from chunkmill.domain.reasons import printable, reason_of
from chunkmill.domain.shown import shown

Format = Literal["auto", "json", "text"]

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "data"}
"""``data`` is a field of Celery's, which repeats the message."""
_TALKATIVE = (
    "alembic", "amqp", "asyncio", "filelock", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "kombu",
    "openai", "opentelemetry", "redis", "transformers", "urllib3",
)  # fmt: skip
"""Libraries that log every request, or every message with its body."""
_EACH_TASK = ("celery.app.trace", "celery.worker.strategy")
"""They log that a task came and ended, by its UUID. What became of the ChunkBatch stands in a line of the worker's."""

_fields: ContextVar[MappingProxyType[str, object]] = ContextVar("fields", default=MappingProxyType({}))


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Add ``fields``, ids and counts of the present work, to every line that this thread logs meanwhile."""
    token = _fields.set(MappingProxyType({**_fields.get(), **fields}))
    try:
        yield
    finally:
        _fields.reset(token)


def _bind(record: logging.LogRecord) -> bool:
    """Add the bound fields to a record that lacks them. It is a filter of the handler because that runs in the thread
    that logs."""
    for key, value in _fields.get().items():
        if key not in vars(record):
            setattr(record, key, value)
    return True


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _masked(value: object) -> object:
    """A field as JSON can hold it, with each string in it masked."""
    if isinstance(value, str):
        return without_passwords(value)
    if isinstance(value, Mapping):
        return {without_passwords(str(key)): _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(item) for item in value]
    return value


@lru_cache(maxsize=4)  # many lines of a busy gateway are of the same second
def _time_of(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


_ENCODER = json.JSONEncoder(default=lambda value: without_passwords(str(value)))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time_of(int(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_passwords(record.getMessage()),
        }
        line |= {name: _masked(value) for name, value in _fields_of(record).items()}
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = told(record.exc_info[1])
        return _ENCODER.encode(line)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        fields = " ".join(f"{key}={value}" for key, value in _fields_of(record).items())
        return shown(without_passwords(super().formatMessage(record) + (f"  [{fields}]" if fields else "")))

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another handler may have kept the whole message there
        return super().format(record)

    def formatException(  # noqa: N802 - the library's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return told(ei[1]) if ei[1] is not None else ""


_PASSWORD = re.compile(r"(://[^\s:/?#@'\"]*:)[^\s'\"]*@")
"""From the first colon to the last @, because a password that was not encoded may hold both, and / ? # as well."""
_PASSWORD_PARAMETER = re.compile(r"""(?i)((?:password|secret|scram_\w+_key)=)(?:'[^']*'|"[^"]*"|[^\s&'",)]+)""")
_PASSWORD_FIELD = re.compile(r"""(?i)(['"]\w*password['"]: ?)(?:'[^']*'|"[^"]*")""")
_TOKEN = re.compile(r"(?i)(\bbearer )[^\s'\",]+")
_KEY = re.compile(r"\bsk-[\w*.-]{6,}", re.ASCII)
_SIGNS = ("password", "secret=", "_key=", "bearer ", "sk-", "://")
"""Without one of them, in whatever case, no pattern above matches."""


def without_passwords(said: str) -> str:
    """The text with the passwords of URLs and connection strings masked, and keys. This is a safety net: none should
    get here."""
    said = printable(said)
    folded = said.casefold()
    if not any(sign in folded for sign in _SIGNS):
        return said  # nearly every line: the patterns take ten times as long
    for pattern in (_PASSWORD_PARAMETER, _PASSWORD_FIELD, _TOKEN):
        said = pattern.sub(r"\1***", said)
    return _KEY.sub("sk-***", _PASSWORD.sub(r"\1***@", said))


def told(error: BaseException) -> str:
    """A traceback with the causes last. Of each error it has the words that :func:`reason_of` lets through."""
    parts: list[str] = []
    at: BaseException | None = error
    while at is not None:
        name, said = type(at).__qualname__, shown(reason_of(at))
        parts.append(
            "".join(traceback.format_tb(at.__traceback__)) + (said if said.startswith(name) else f"{name}: {said}")
        )
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return without_passwords("\nbecause of\n".join(parts))


def configure(level: str | int = logging.INFO, form: Format = "auto") -> None:
    """Send the root logger, warnings and uncaught errors to stderr. Processes call this, the library never does."""
    level = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_bind)
    as_text = sys.stderr.isatty() if form == "auto" else form == "text"
    handler.setFormatter(_Text() if as_text else _Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for talkative in _TALKATIVE:
        logging.getLogger(talkative).setLevel(max(level, logging.WARNING))
    for name in _EACH_TASK:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def log_in_handler(name: str, message: str) -> None:
    """Write one line of level INFO as the root logger would, from a signal handler.

    A handler may have interrupted a thread in the middle of a line, so this waits for no lock and fills no buffer.
    """
    record = logging.LogRecord(name, logging.INFO, __file__, 0, " ".join(message.split()), None, None)
    handlers = logging.getLogger().handlers
    if handlers and logging.getLogger().isEnabledFor(logging.INFO):
        with suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{handlers[0].format(record)}\n".encode())


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("uncaught").critical("%s ends the process", kind.__qualname__, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        logging.getLogger("uncaught").critical(
            "%s ends thread %s", args.exc_type.__qualname__, args.thread.name if args.thread else "?",
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        )  # fmt: skip
