"""Pages as HTML. Everything that is put into a template is escaped, and nothing in a page comes from elsewhere."""

from __future__ import annotations

import functools
import json
from datetime import UTC, datetime
from decimal import Decimal
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import Response

from chunkmill.domain.budget import dollars
from chunkmill.domain.shown import shown

HEADERS = {
    # Scripts and styles are files of the gateway: what is injected into a page by mistake does not run.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # Not "no-referrer": with that a browser sends "Origin: null" with the page's own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
LONGEST_SHOWN = 600
"""How many characters of a text a page shows."""


def html(template: str, *, status: int = 200, **context: Any) -> Response:
    """A page of the template."""
    body = _environment().get_template(template).render(**context)
    return Response(body, status, HEADERS, "text/html; charset=utf-8")


@functools.cache
def static(name: str) -> bytes:
    return (files(__package__) / "static" / name).read_bytes()


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("chunkmill.gateway.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "shown": lambda text: shown(str(text)),
        "beginning": beginning,
        "number": lambda number: f"{number:,}",
        "short": short_number,
        "percent": lambda share: f"{100 * share:.0f} %" if share in (0, 1) else f"{min(99.9, 100 * share):.1f} %",
        "usd": lambda amount: f"${dollars(amount)}",
        "ago": ago,
        "moment": lambda at: at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "marked": marked,
        "compact": lambda value: shown(json.dumps(value, ensure_ascii=False)),
    }
    return made


def beginning(text: str, most: int = LONGEST_SHOWN) -> str:
    """The beginning of a text of any length, as it can be shown."""
    cut = text[:most]
    return shown(cut, lines=True) + ("…" if len(text) > most else "")


def marked(text: str) -> Markup:
    """A text in which `` `word` `` becomes code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 and i < len(parts) - 1 else escape(part)
        for i, part in enumerate(parts)
    )


def short_number(number: float) -> str:
    """A number in few letters: 1,234 or 12.3 k or 4.5 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,.0f}"


def ago(at: datetime | None, now: datetime | None = None) -> str:
    """How long ago something was, in one unit."""
    if at is None:
        return "never"
    seconds = max(0.0, ((now or datetime.now(UTC)) - at).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def share_of(spent: Decimal, limit: Decimal | None) -> float | None:
    """The share of a limit that is used, from 0 to 1; None without a limit."""
    if limit is None:
        return None
    return float(min(Decimal(1), spent / limit)) if limit else 1.0
