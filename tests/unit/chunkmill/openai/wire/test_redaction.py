"""What is kept of a provider's message holds no part of a secret, wherever in the message it stands."""

from __future__ import annotations

import pytest

from chunkmill.openai.wire.redaction import MAX_CHARACTERS, clean, redact

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


@pytest.mark.parametrize(
    "sign", ["\x00", "\x1b", "\x7f", "\x9b", "\u200b", "\u202e", "\u2066", "\ufeff", "\ud800", "\U000e0041"]
)
def test_a_sign_that_cannot_be_seen_is_removed_and_hides_no_secret(sign: str) -> None:
    secret = SECRETS[0]

    kept = redact(f"{sign}It is{sign} {sign.join(secret)}{sign}.", SECRETS)

    assert kept == "It is [redacted]."


@pytest.mark.parametrize("sign", ["\n", "\r\n", "\t", "\v", "\x85", "\u2028", "\x1c", "\xa0"])
def test_what_breaks_a_line_is_a_blank(sign: str) -> None:
    assert clean(f"one{sign}two") == "one two"


def test_words_of_any_kind_are_text() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]

    assert clean({"a": [1, "x"]}) == "{'a': [1, 'x']}"
    assert clean(None) == ""
    assert clean(nested) == "something of type list that cannot be shown"
    assert clean(10**5_000) == "something of type int that cannot be shown"
    assert clean("漢字 é 👩") == "漢字 é 👩"
