"""Shortens vectors, for a space with fewer dimensions than the model gives."""

from chunkmill.domain.vectors import shorten

__all__ = ["shorten"]
