"""Settings of the gateway."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode


def _hosts(given: object) -> object:
    """Names in a list with commas, in lower case and without ports."""
    if not isinstance(given, str):
        return given
    names = frozenset(name.strip().lower() for name in given.split(",")) - {""}
    if wrong := sorted(name for name in names if "/" in name or "*" in name or name.count(":") == 1):
        raise ValueError(f"{wrong[0]!r} is not the name of a host: write names such as api.example, without a port")
    return names


class GatewaySettings(BaseSettings):
    """The settings that only ``chunkmill gateway`` reads."""

    gateway_waiting_texts: int = Field(
        4096,
        ge=1,
        description="How many texts may wait in one gateway. Requests beyond it get HTTP 429. A quarter of this and of "
        "GATEWAY_WAITING_TOKENS is kept for requests of at most 8 texts.",
    )
    gateway_waiting_tokens: int = Field(
        1_000_000, ge=1, description="How many tokens, at four bytes each, may wait in one gateway."
    )
    gateway_body_seconds: float = Field(
        30.0,
        gt=0,
        description="How many seconds a caller may take to send a request. An upload must bring 16 KiB a second after "
        "that.",
    )
    gateway_connections: int = Field(
        4096,
        ge=1,
        description="Maximum number of connections to one gateway. One more ends the oldest connection without a "
        "request.",
    )
    gateway_drain_seconds: float = Field(
        10.0, ge=0, description="How many seconds requests may go on after a gateway was told to end (SIGTERM)."
    )
    gateway_hosts: Annotated[frozenset[str] | None, NoDecode, BeforeValidator(_hosts)] = Field(
        None,
        description="Names of hosts, separated by commas, for which the gateway answers besides `localhost`, such as "
        "those that a proxy passes on. If unset, a gateway on loopback answers for no other, and any other for all.",
    )
    gateway_behind_tls: bool = Field(
        False,
        description="Whether a proxy in front of the gateway speaks TLS. If `true`, the gateway does not warn that "
        "keys travel unencrypted.",
    )
