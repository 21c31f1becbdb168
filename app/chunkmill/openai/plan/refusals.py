"""What a provider's refusal means. Pure.

This is the only place that decides it: for plain requests, for the calls that make a batch, for batches that failed
validation, and for the lines of a batch that ran. A refusal that concerns everybody must cost no text, because the
next text would be refused in the same way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final


class Meaning(Enum):
    """Whom or what a refusal concerns."""

    STOP = "stop"
    """Everybody: the key, the account, its money, the model or the address. Only a person can help."""
    WAIT = "wait"
    """A limit on what may be sent or queued now, which passes by itself."""
    OUTAGE = "outage"
    """The server failed. The request may have been carried out."""
    NOT_RUN = "not_run"
    """The provider never ran the request, or stopped it."""
    SIZE = "size"
    """The request is too large, and a smaller one may be taken."""
    TEXT = "text"
    """One of the request's texts is at fault, or whatever else this request is about."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a refusal means. If it is a stop, ``advice`` is what a person should do, ready to end a message."""

    meaning: Meaning
    advice: str = ""


RESUME: Final = "The lane stays stopped until: chunkmill lanes resume"


def _stop(what: str) -> Refusal:
    return Refusal(Meaning.STOP, f"{what}. {RESUME}")


_PAY: Final = _stop("Pay or raise the limit")
_KEY: Final = _stop("Fix OPENAI_API_KEY, or what it is allowed to do")
_MODEL: Final = _stop("Check the model's name and OPENAI_MODELS")
_ADDRESS: Final = _stop("Check OPENAI_BASE_URL, which ends in /v1 for most servers")
_DIMENSIONS: Final = _stop("Check `dimensions` and `can_cut` of the model in OPENAI_MODELS")
_FORM: Final = _stop("The server does not understand the form of our requests: see docs/openai.md, Other servers")

_STOP_CODES: Final = {
    **dict.fromkeys(
        (
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "account_deactivated",
            "budget_exceeded",
            "insufficient_balance",
        ),
        _PAY,
    ),
    **dict.fromkeys(("invalid_api_key", "invalid_authentication", "invalid_organization", "permission_denied"), _KEY),
    **dict.fromkeys(("model_not_found", "model_mismatch"), _MODEL),
    **dict.fromkeys(("url_mismatch", "invalid_endpoint", "unknown_url"), _ADDRESS),
}
_FORM_CODES: Final = frozenset({"unsupported_parameter", "unknown_parameter"})
_STOP_PARAMETERS: Final = {"model": _MODEL, "dimensions": _DIMENSIONS, "encoding_format": _FORM}
_WAIT_CODES: Final = frozenset({"token_limit_exceeded", "request_limit_exceeded", "rate_limit_exceeded"})
_NOT_RUN_CODES: Final = frozenset({"batch_expired", "batch_cancelled", "batch_canceled", "cancelled", "canceled"})
_SIZE_CODES: Final = frozenset({"max_tokens_per_request", "array_above_max_length"})
# Statuses below 500 that also say that the server failed. Text Embeddings Inference answers 424 if its GPU fails.
_OUTAGES: Final = frozenset({408, 409, 424, 425})
# Compatible servers and gateways say much with one status and only in words. Each of these was seen at a real one.
_STOP_WORDS: Final = (
    (re.compile(r"exceeded your current quota|budget has been exceeded|insufficient (?:balance|credit|funds)"), _PAY),
    (re.compile(r"not support\b.{0,60}\b(?:dimensions|matryoshka)"), _DIMENSIONS),
    (re.compile(r"\bbase64\b.{0,60}\bnot\b.{0,30}\bsupported|not support\b.{0,60}\bbase64\b"), _FORM),
    (
        re.compile(r"invalid model name|unknown model|no such model|\bmodel\b.{0,120}\b(?:not found|does not exist)"),
        _MODEL,
    ),
)
_SIZE_WORDS: Final = re.compile(
    r"batch size|array too long|too many (?:inputs|texts)|(?:payload|request|entity)[\w ]{0,20} too large"
)


def refusal(
    status: int | None, code: str, message: str, *, kind: str = "", parameter: str = "", of_all: bool = True
) -> Refusal:
    """What a refusal means.

    ``status`` is the HTTP status, or None if a batch says that it failed or that it did not run a request. ``code``,
    ``kind`` and ``parameter`` are the words that the provider has for the error, its type, and the argument that is
    wrong. ``of_all`` is false for calls about one object at the provider: there, 404 says that this object is gone.
    """
    words = {code.lower(), kind.lower()}
    said = message.lower()
    in_words = of_all and (status is None or 400 <= status < 500)
    if stop := next((stop for word, stop in _STOP_CODES.items() if word in words), None):
        return stop
    if in_words and (stop := next((stop for pattern, stop in _STOP_WORDS if pattern.search(said)), None)):
        return stop
    if status in (401, 403):
        return _KEY
    if status == 402:
        return _PAY
    if words & _NOT_RUN_CODES:
        return Refusal(Meaning.NOT_RUN)
    if words & _WAIT_CODES or status == 429 or _names_a_limit(said):
        return Refusal(Meaning.WAIT)
    if status is None or status in _OUTAGES or status < 400 or (status >= 500 and status != 501):
        return Refusal(Meaning.OUTAGE)
    if of_all and (status in (405, 501) or (status == 404 and "file" not in said)):
        return _ADDRESS
    if of_all and (stop := _STOP_PARAMETERS.get(parameter, _FORM if words & _FORM_CODES else None)):
        return stop
    if status == 413 or words & _SIZE_CODES or _SIZE_WORDS.search(said):
        return Refusal(Meaning.SIZE)
    return Refusal(Meaning.TEXT)


def _names_a_limit(said: str) -> bool:
    """Whether it says "Enqueued token limit reached for …", a message that comes with several codes."""
    return "enqueued" in said and "limit" in said
