"""Which space answers the searches of a session, and the ids by which feedback comes back to a search. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
import struct
from dataclasses import dataclass

from chunkmill.errors import InvalidInput

_LAYOUT = struct.Struct("<BII12s")
"""Version, collection, space, and a random number that tells two searches apart."""
_VERSION = 1


def percent_of(session: str, reembedding_id: int) -> int:
    """A number from 0 to 99 that is always the same for a session in one re-embedding.

    A session whose number is less than the share of the new space is answered by it. So whoever is answered by the new
    space at 10 % is so at 25 %, too, and each re-embedding begins with other sessions.
    """
    digest = hashlib.sha256(f"{reembedding_id} {session}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


@dataclass(frozen=True, slots=True)
class SearchId:
    """What a search id says: the collection and the space that answered."""

    collection_id: int
    space_id: int
    number: bytes
    """12 random bytes."""

    @classmethod
    def new(cls, collection_id: int, space_id: int) -> SearchId:
        return cls(collection_id, space_id, secrets.token_bytes(12))

    @classmethod
    def read(cls, text: str) -> SearchId:
        """Raises :class:`InvalidInput` if ``text`` is not the id of a search."""
        try:
            version, collection_id, space_id, number = _LAYOUT.unpack(base64.urlsafe_b64decode(text))
        except (binascii.Error, ValueError, struct.error):
            version = None
        if version != _VERSION:
            raise InvalidInput(
                f"search_id is {text[:40]!r}, which is not the id of a search. Pass the search_id of the hits."
            )
        return cls(collection_id, space_id, number)

    def __str__(self) -> str:
        packed = _LAYOUT.pack(_VERSION, self.collection_id, self.space_id, self.number)
        return base64.urlsafe_b64encode(packed).decode()
