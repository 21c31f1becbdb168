"""Keys of the gateway: their form and their ends."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from chunkmill.domain.keys import UNLIMITED, ApiKey, Scope, digest_of, key_of, new_secret, parse_key

NOW = datetime(2026, 11, 29, tzinfo=UTC)
KEY = ApiKey(7, "abcd", "a", "a", (Scope.EMBED,), None, None, UNLIMITED, NOW, None, None, None)


def test_a_key_has_256_random_bits_and_comes_back_from_its_parts() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    for secret in secrets:
        assert parse_key(key_of(12, secret)) == (12, secret)
        assert len(digest_of(secret)) == 32


@pytest.mark.parametrize(
    "key",
    [
        "",
        "cmk_",
        "cmk_1_short",
        f"cmk_0_{'a' * 43}",
        f"cmk_-1_{'a' * 43}",
        f"cmk_1_{'a' * 44}",
        f"cmk_1_{'a' * 42}ä",
        f"cmk_{'9' * 30}_{'a' * 43}",
        f"sk_1_{'a' * 43}",
        f"cmk_1_{'a' * 43}\n",
        f"cmk_\u0661_{'a' * 43}",
        "cmk_1_" + "\0" * 43,
    ],
)
def test_what_does_not_look_like_a_key_is_none(key: str) -> None:
    assert parse_key(key) is None


def test_a_key_ends_when_it_is_revoked_or_its_time_is_over() -> None:
    assert KEY.state(NOW) == "live"
    later = dataclasses.replace(KEY, expires_at=NOW + timedelta(seconds=1))
    assert [later.state(NOW), later.state(NOW + timedelta(seconds=1))] == ["live", "expired"]
    assert dataclasses.replace(later, revoked_at=NOW).state(NOW + timedelta(days=1)) == "revoked"
