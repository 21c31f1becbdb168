"""The settings of the gateway."""

from __future__ import annotations

import pytest

from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings


def test_aliases_are_pairs_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MODEL_ALIASES", " text-embedding-3-small = all-MiniLM-L6-v2 ,b=org/name@1,")
    assert Settings.from_env().gateway_model_aliases == {
        "text-embedding-3-small": "all-MiniLM-L6-v2",
        "b": "org/name@1",
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a", "of the form alias=model"),
        ("a=", "of the form alias=model"),
        ("=b", "of the form alias=model"),
        ("a=b,a=c", "given twice"),
        ("a=b,b=c", "stands for another alias"),
    ],
)
def test_wrong_aliases_are_told(monkeypatch: pytest.MonkeyPatch, given: str, words: str) -> None:
    monkeypatch.setenv("GATEWAY_MODEL_ALIASES", given)
    with pytest.raises(InvalidSetting, match=words) as wrong:
        Settings.from_env()
    assert "GATEWAY_MODEL_ALIASES" in str(wrong.value)


def test_the_meaning_of_token_ids_is_one_of_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_env().gateway_token_ids == "cl100k"
    monkeypatch.setenv("GATEWAY_TOKEN_IDS", "model")
    with pytest.raises(InvalidSetting, match="GATEWAY_TOKEN_IDS"):
        Settings.from_env()
