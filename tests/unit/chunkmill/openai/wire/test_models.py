"""Which names mean one model, and which an answer of another model's."""

from __future__ import annotations

import pytest

from chunkmill.domain.providers import OPENAI_MODELS
from chunkmill.openai.wire.models import is_another, is_same_model

SMALL = "text-embedding-3-small"


@pytest.mark.parametrize(
    "other",
    [
        SMALL,
        SMALL.upper(),
        f"models/{SMALL}",
        f"openai/{SMALL}",
        f"{SMALL}-2024-01-25",
        f"openai/{SMALL}-20240125",
        f"{SMALL}@001",
        f"{SMALL}-0125",
        f"{SMALL}:latest",
    ],
)
def test_an_owner_and_a_date_leave_the_model_what_it_is(other: str) -> None:
    assert is_same_model(SMALL, other)
    assert is_same_model(other, SMALL)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SMALL, "text-embedding-3-large"),
        (SMALL, "text-embedding-3"),
        ("e5-base", "e5-base-v2"),
        ("qwen3-embedding", "qwen3-embedding-8b"),
        ("all-minilm-l6", "all-minilm-l6-512"),
        ("gemini-embedding-001", "gemini-embedding-002"),
        (f"{SMALL}-2024-01-25", f"{SMALL}-2026-01-25"),
        ("a/m", "b/m"),
        ("m", ""),
    ],
)
def test_what_looks_alike_is_another_model(one: str, other: str) -> None:
    assert not is_same_model(one, other)
    assert not is_same_model(other, one)


def test_only_a_name_that_we_know_can_be_another_models() -> None:
    assert is_another("text-embedding-3-large", SMALL, OPENAI_MODELS)
    assert is_another("text-embedding-ada-002-v2", SMALL, OPENAI_MODELS)
    assert not is_another("text-embedding-ada-002-v2", "text-embedding-ada-002", OPENAI_MODELS)
    assert not is_another(f"{SMALL}-2024-01-25", SMALL, OPENAI_MODELS)
    assert not is_another("a-model", SMALL, OPENAI_MODELS)
    assert not is_another(SMALL, "my-deployment", OPENAI_MODELS)
