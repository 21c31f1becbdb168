"""The small pure decisions: retries, doorbells, fingerprints, settings."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.doorbells import plan_doorbells
from chunkmill.domain.retries import retry_delay
from chunkmill.domain.spaces import LongText, OnLong, Pooling, Precision, SpaceSpec, long_text_for, pooling_of
from chunkmill.errors import InvalidSetting
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings


def test_retries_back_off_and_end() -> None:
    delays = [retry_delay(attempt, 5, retryable=True) for attempt in range(1, 6)]
    assert delays == [2.0, 4.0, 8.0, 16.0, None]
    assert retry_delay(1, 5, retryable=False) is None
    assert retry_delay(30, 99, retryable=True) == 300.0


@given(st.integers(-1000, 1000), *[st.integers(0, 1000)] * 3)
def test_doorbells_never_pass_the_window(room: int, queued: int, rung: int, stale: int) -> None:
    plan = plan_doorbells(room=room, queued=queued, rung=rung, stale=min(stale, rung))
    assert plan.fresh >= 0
    assert 0 <= plan.again <= stale
    assert max(0, room) // 2 <= plan.fresh <= max(0, room) <= plan.fresh + plan.again


def test_lost_doorbells_are_replaced_and_present_ones_are_not() -> None:
    assert plan_doorbells(room=10, queued=0, rung=4, stale=4).again == 4  # FLUSHALL
    assert plan_doorbells(room=10, queued=4, rung=4, stale=4).again == 0  # a long queue, nothing lost
    assert plan_doorbells(room=10, queued=3, rung=4, stale=4).again == 1  # one lost on its way
    assert plan_doorbells(room=10, queued=0, rung=4, stale=0).again == 0  # rung a moment ago


SPEC = SpaceSpec("local", "m", "sha256:00", 384, 256, Pooling.MEAN, normalize=True)


@pytest.mark.parametrize(
    "change",
    [
        {"provider": "other"},
        {"revision": "sha256:01"},
        {"dimensions": 385},
        {"max_tokens": 255},
        {"pooling": Pooling.CLS},
        {"normalize": False},
        {"document_prompt": "passage: "},
        {"query_prompt": "query: "},
        {"long_text": LongText.SPLIT},
        {"precision": Precision.INT8},
        {"task": "retrieval"},
        {"query_task": "retrieval"},
        {"query_model": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_a_vector_changes_the_fingerprint(change: dict[str, object]) -> None:
    assert dataclasses.replace(SPEC, **change).fingerprint != SPEC.fingerprint


def test_a_fingerprint_is_the_same_in_every_release() -> None:
    """Vectors are found by it: if it changed, all of them would be computed and paid for again."""
    prompted = dataclasses.replace(SPEC, document_prompt="Über: ", query_prompt="質問: ")
    assert prompted.fingerprint == "fac35db5adaed56e85857124489f61e85f0b9c77cb7acff5b920e5e08e82a2ff"


def test_a_space_of_an_earlier_release_keeps_its_fingerprint() -> None:
    """These are of the release before ``task`` and ``query_model``: without them, nothing is added to the JSON."""
    fingerprints = {
        pooling: dataclasses.replace(SPEC, pooling=pooling).fingerprint for pooling in (Pooling.MEAN, Pooling.CLS)
    }
    assert fingerprints == {
        Pooling.MEAN: "06ac3f96c734e20ad97cf4474acc80ee0286044efa50242329eefc6658cfc56c",
        Pooling.CLS: "87b9bc95fe86fb7d0be37c95fec994db15930a8fe02c965921339be80122a243",
    }
    assert DEFAULT_SPEC.fingerprint == "ac41cc11c3b64e4416b756bf2b536ece458f9a1924416eaf83da672383e5c966"


def test_poolings_that_are_joined_are_a_word_of_their_own() -> None:
    joined = pooling_of("cls+mean")
    space = dataclasses.replace(SPEC, pooling=joined)

    assert joined.modes == (Pooling.CLS, Pooling.MEAN)
    assert json.loads(json.dumps(dataclasses.asdict(space)))["pooling"] == "cls+mean"
    assert space.fingerprint not in {SPEC.fingerprint, dataclasses.replace(SPEC, pooling=Pooling.CLS).fingerprint}
    assert space.fingerprint != dataclasses.replace(SPEC, pooling=pooling_of("mean+cls")).fingerprint
    for word in ("cls+", "cls+median", "mean+provider", "+"):
        with pytest.raises(ValueError, match="is not a valid Pooling"):
            pooling_of(word)


def test_the_label_does_not_change_the_fingerprint() -> None:
    assert dataclasses.replace(SPEC, model="/another/path").fingerprint == SPEC.fingerprint


def test_reject_shares_the_space_of_truncate() -> None:
    assert long_text_for(OnLong.REJECT) is long_text_for(OnLong.TRUNCATE) is LongText.TRUNCATE
    assert long_text_for(OnLong.SPLIT) is LongText.SPLIT


def test_settings_name_each_wrong_variable_and_hide_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://root:hunter2@db/x")
    monkeypatch.setenv("LEASE_SECONDS", "-1")
    with pytest.raises(InvalidSetting) as caught:
        Settings.from_env()
    assert "DATABASE_URL" in str(caught.value)
    assert "LEASE_SECONDS" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_usual_postgres_url_is_driven_by_psycopg(scheme: str) -> None:
    assert Settings.from_env(database_url=f"{scheme}://h/d").database_url == "postgresql+psycopg://h/d"


def test_settings_do_not_print_secrets() -> None:
    settings = Settings.from_env(database_url="postgresql://u:hunter2@h/d", redis_url="redis://:hunter2@h")
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


@pytest.mark.parametrize("setting", ["openai_base_url", "budget_webhook_url"])
@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("https://api.example.com/v1", True),
        ("http://127.0.0.1:8080/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8080", True),
        ("http://api.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("https://key@api.example.com/v1", False),
        ("https://api.example.com/v1?key=x", False),
        ("ftp://127.0.0.1/v1", False),
    ],
)
def test_what_is_secret_crosses_no_network_in_the_clear(setting: str, url: str, taken: bool) -> None:
    if taken:
        assert getattr(Settings.from_env(**{setting: url}), setting) == url
    else:
        with pytest.raises(InvalidSetting, match=setting):
            Settings.from_env(**{setting: url})
