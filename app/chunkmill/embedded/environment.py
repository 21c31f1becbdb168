"""The settings with the addresses of the servers, from the environment or from the embedded stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkmill.embedded import Stack
from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings


@dataclass(frozen=True, slots=True)
class Environment:
    """``settings`` with both addresses. ``is_embedded`` says whether they are those of the embedded stack."""

    settings: Settings
    is_embedded: bool

    @classmethod
    def load(cls, *, needs_database: bool = True, needs_redis: bool = True, **given: Any) -> Environment:
        """Read the settings, and find the servers.

        If neither ``DATABASE_URL`` nor ``REDIS_URL`` is set, the servers are those of the embedded stack, which must be
        running: a process whose variables got lost must not write into servers that nobody knows of. Without
        ``needs_database``, ``REDIS_URL`` alone is enough, and without ``needs_redis``, ``DATABASE_URL`` is.

        ``given`` are settings by their names, which come before the environment. An address that is given is never
        joined to the other one of the environment, because they would be those of two installations. A
        ``chunkmill_home`` that is given means the stack in that folder, whatever addresses the environment has.

        Raises :class:`InvalidSetting` and :class:`EmbeddedStackError`.
        """
        settings = Settings.from_env(**given)
        addresses = {"database_url", "redis_url"}
        if lacking := addresses - given.keys():
            if len(lacking) == 1:
                (one,) = lacking
                raise InvalidSetting(f"{one} is not given. Give database_url and redis_url, or neither of them.")
            if "chunkmill_home" in given:
                settings = settings.model_copy(update=dict.fromkeys(addresses))
        has_both = bool(settings.redis_url or not needs_redis) and bool(settings.database_url or not needs_database)
        if has_both and (settings.redis_url or settings.database_url):
            return cls(settings, is_embedded=False)
        if settings.database_url or settings.redis_url:
            unset = "REDIS_URL" if settings.database_url else "DATABASE_URL"
            raise InvalidSetting(f"{unset} is not set. Set both, or neither to use the embedded stack.")
        status = Stack(settings.chunkmill_home).status()
        if not status.running:
            unset = "" if "chunkmill_home" in given else "DATABASE_URL and REDIS_URL are not set, and "
            raise InvalidSetting(
                f"{unset}no embedded stack runs in {status.home}. Set both addresses, or start the stack on this "
                "machine: chunkmill up"
            )
        # The constructor validates the addresses and brings them into their final form.
        return cls(
            Settings.from_env(**given, database_url=status.database_url, redis_url=status.redis_url), is_embedded=True
        )
