"""What the client scripts share. They run in environments of their own, so this needs nothing but Python.

A script reads what to embed from its standard input and writes what its client made of it to its standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

given: dict[str, Any] = json.load(sys.stdin)
URL: str = given["url"]
KEY: str = given["key"]
MODEL: str = given["model"]
ALIAS: str = given["alias"]
"""A name of OpenAI's for the same model, for clients that know only these."""
TEXTS: list[str] = given["texts"]
QUERY: str = given["query"]

_cases: dict[str, dict[str, Any]] = {}


def case(name: str, vectors: Iterable[Iterable[float]], texts: list[str] | None = None, kind: str = "document") -> None:
    """Note the vectors of one way to ask. ``texts`` are those that were asked for, without them ``TEXTS``."""
    numbers = [[float(number) for number in vector] for vector in vectors]
    _cases[name] = {"texts": TEXTS if texts is None else texts, "kind": kind, "vectors": numbers}


def end() -> None:
    json.dump(_cases, sys.stdout)
