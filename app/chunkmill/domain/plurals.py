"""A number and what it counts, in words."""

from __future__ import annotations


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 chunk`, `2,000 chunks`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
