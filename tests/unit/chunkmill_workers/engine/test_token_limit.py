"""How many tokens share a pass, after some passes did not fit the device's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkmill_workers.engine.token_limit import TRIAL_AFTER, TokenLimit


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the lesson is kept; another device's lies beside it."""
    (tmp_path / "other.json").write_text('{"batch_tokens": 7}')
    return tmp_path / "own.json"


def test_a_pass_that_did_not_fit_halves_the_budget_here_and_in_the_next_process(file: Path) -> None:
    TokenLimit(8000, file).shrink(4000)
    assert TokenLimit(8000, file).tokens == 2000
    assert json.loads((file.parent / "other.json").read_text()) == {"batch_tokens": 7}


def test_a_failure_that_comes_late_raises_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A larger pass was under way when a smaller one failed, and fails after it."""
    limit = TokenLimit(8000, file)
    limit.shrink(1000)
    caplog.clear()
    limit.shrink(8000)
    limit.shrink(1000)
    assert limit.tokens == 500
    assert TokenLimit(8000, file).tokens == 500
    assert not caplog.records


def test_shrinking_ends_at_the_longest_row(file: Path) -> None:
    limit = TokenLimit(8000, file, least=256)
    limit.shrink(600)
    assert limit.tokens == 300
    limit.shrink(300)
    assert limit.tokens == 256
    limit.shrink(256)
    assert limit.tokens == 256


def test_a_lesson_lowers_what_is_asked_for_and_never_raises_it(file: Path) -> None:
    TokenLimit(8000, file).shrink(2000)
    assert TokenLimit(900, file).tokens == 900
    assert TokenLimit(1001, file).tokens == 1000


@pytest.mark.parametrize("text", ['{"batch_tokens": 0}', '{"batch_tokens": -5}', '{"batch_tokens": "9"}', "[]", "{"])
def test_a_file_that_is_no_lesson_changes_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    assert TokenLimit(8000, file).tokens == 8000


def fit(limit: TokenLimit, passes: int) -> None:
    for _ in range(passes):
        limit.fitted(limit.tokens)


def test_the_budget_rises_again_while_passes_fit(file: Path) -> None:
    limit = TokenLimit(8000, file)
    limit.shrink(4000)
    fit(limit, TRIAL_AFTER - 1)
    assert limit.tokens == 2000
    fit(limit, 1)
    assert limit.tokens == 4000
    fit(limit, TRIAL_AFTER)
    assert limit.tokens == 8000
    fit(limit, 100 * TRIAL_AFTER)
    assert limit.tokens == 8000, "never above the configured number"
    assert TokenLimit(8000, file).tokens == 8000, "the next process starts with what fits now"


def test_what_an_earlier_process_learned_is_forgotten_in_the_same_way(file: Path) -> None:
    TokenLimit(8000, file).shrink(1000)
    limit = TokenLimit(8000, file)
    fit(limit, TRIAL_AFTER)
    assert limit.tokens == 1000


def test_a_trial_that_fails_doubles_the_passes_before_the_next(file: Path) -> None:
    limit = TokenLimit(8000, file)
    limit.shrink(8000)
    fit(limit, TRIAL_AFTER)
    assert limit.tokens == 8000
    limit.shrink(8000)
    fit(limit, TRIAL_AFTER)
    assert limit.tokens == 4000
    fit(limit, TRIAL_AFTER)
    assert limit.tokens == 8000


def test_short_passes_say_nothing_about_longer_ones(file: Path) -> None:
    limit = TokenLimit(8000, file)
    limit.shrink(8000)
    for _ in range(10 * TRIAL_AFTER):
        limit.fitted(2000)
    assert limit.tokens == 4000
