"""Why something failed, in words that any log, table and client may hold.

The message of an exception that is not ours may quote the text that was being worked on, so only its class is told. It
may also hold characters that Postgres cannot store. Every place that writes down an error takes its words from here.
"""

from __future__ import annotations

import errno

from chunkmill.errors import ChunkmillError

LONGEST = 2000
"""The most characters of a reason in the ledger."""

# The messages of these packages name servers and commands. Our commands carry ids, and never a text.
_QUOTE_NO_TEXT = ("chunkmill", "chunkmill_workers", "redis", "kombu", "amqp")


def storable(said: str, longest: int = LONGEST) -> str:
    """``said`` in a form that a text column and UTF-8 can hold: NUL and lone surrogates are escaped, the end is cut."""
    return printable(said[:longest])[:longest]


def printable(said: str) -> str:
    """``said`` with NUL and lone surrogates escaped."""
    return said.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


DOCTOR_SHOWS_MORE = " `chunkmill doctor` shows more."
"""The end of a message about a server, which `doctor` itself leaves out."""


_OF_SHARED_SESSIONS = ("26000", "42P05")
"""A prepared statement is not there, or is there already: another connection has the session that had it."""
_POOLER = (
    " It seems that a pooler before Postgres gives each transaction another session: let DATABASE_URL name Postgres "
    "itself, or set pool_mode = session in PgBouncer."
)


def reason_of(error: BaseException) -> str:
    """What may be told of an error: the whole message if it is ours, else its class and what surely quotes no text.

    Of Postgres' message it is the first line, because rows are quoted below it, and nothing if the value itself was
    refused.
    """
    name = type(error).__name__
    if isinstance(error, ChunkmillError):
        return storable(str(error))
    driver = getattr(error, "orig", None) or error  # SQLAlchemy's errors have the driver's error there
    if hasattr(driver, "sqlstate"):  # found by attribute, because this layer knows no database library
        lines = str(driver).strip().splitlines()
        if (driver.sqlstate or "22").startswith("22") and type(driver).__name__ != "OperationalError":
            return f"{type(driver).__name__} ({driver.sqlstate or 'before it was sent'})"
        said = f"{type(driver).__name__}: {lines[0]}" if lines else type(driver).__name__
        return storable(f"{said}.{_POOLER}" if driver.sqlstate in _OF_SHARED_SESSIONS else said)
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        named = f": {error.filename!r}" if error.filename is not None else ""
        return storable(f"{name}: {error.strerror}{named}")
    if type(error).__module__.partition(".")[0] in _QUOTE_NO_TEXT:
        return storable(f"{name}: {error}")
    return name


def code_of(error: BaseException) -> str:
    """The stable word for an error in logs, metrics and the ledger."""
    return error.code if isinstance(error, ChunkmillError) else "worker_error"
