"""What is kept of a provider's message holds no part of a secret, wherever in the message it stands."""

from __future__ import annotations

import pytest

from chunkmill.openai.wire.redaction import MAX_CHARACTERS, redact

SECRETS = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("length", [MAX_CHARACTERS, 10_000])
def test_a_secret_that_a_cut_would_go_through_is_redacted_whole(secret: str, length: int) -> None:
    """A message is cut twice, to what is looked at and to what is kept: half a secret is none that is recognized."""
    for before in range(length - len(secret), length + 1):
        kept = redact("." * before + secret + " was refused", SECRETS)
        assert len(kept) <= MAX_CHARACTERS
        assert secret[:4] not in kept, before


def test_a_message_of_many_secrets_keeps_what_is_between_them() -> None:
    assert redact(f"{SECRETS[0]} is not {SECRETS[1]}", SECRETS) == "[redacted] is not [redacted]"


def test_an_empty_secret_hides_nothing() -> None:
    assert redact("a message", ("", *SECRETS)) == "a message"
