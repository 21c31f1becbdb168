"""What `chunkmill reembed` shows on a terminal in each state."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from chunkmill import Gates, Priority, Route
from chunkmill.cli.collections.reembed import _row, _show
from chunkmill.cli.output import Screen
from chunkmill.domain.reembedding import Reembedding, ReembeddingState

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC).astimezone()
RAMPING = Reembedding(
    id=7, collection="docs", state=ReembeddingState.RAMPING,
    from_space="a" * 64, from_model="org/old", to_space="b" * 64, to_model="org/new",
    share=25, ramp=(25, 100), step_hours=2.0, keep_days=14.0, priority=Priority.LOW, route=Route.LOCAL,
    limits=Gates(), gates=(), coverage=None, served=(), problem=None, paused_at=None, job_id=None,
    created_at=NOON, state_since=NOON, flipped_at=None, finished_at=None, dropped_at=None, share_since=NOON,
)  # fmt: skip


def shown(reembedding: Reembedding) -> str:
    screen, file = Screen(as_json=False), io.StringIO()
    screen.out = screen.err = Console(file=file, width=120, force_terminal=True, color_system=None, highlight=False)
    _show(screen, reembedding)
    return " ".join(file.getvalue().split())


def test_the_next_step_is_named_while_one_comes() -> None:
    assert RAMPING.next_step_at == NOON + timedelta(hours=2)
    assert "next step not before 2026-11-30 " in shown(RAMPING)
    last = replace(RAMPING, ramp=(25, 50), share=50)
    for without in (last, replace(RAMPING, paused_at=NOON), replace(RAMPING, state=ReembeddingState.FLIPPED)):
        assert without.next_step_at is None
        assert "next step" not in shown(without)
    assert replace(RAMPING, share=100).next_step_at == NOON + timedelta(hours=2)  # the flip


@pytest.mark.parametrize(
    ("state", "dropped_at", "said"),
    [
        (ReembeddingState.FLIPPED, NOON, f"way back kept until {NOON:%Y-%m-%d %H:%M}"),
        (ReembeddingState.FINISHED, None, "way back none: the vectors of the space that the collection left are"),
        (ReembeddingState.ROLLED_BACK, NOON, f"new space its vectors are kept until {NOON:%Y-%m-%d %H:%M}"),
        (ReembeddingState.ROLLED_BACK, None, "new space its vectors are dropped"),
    ],
)
def test_a_way_back_is_named_only_where_there_is_one(
    state: ReembeddingState, dropped_at: datetime | None, said: str
) -> None:
    told = shown(replace(RAMPING, state=state, dropped_at=dropped_at))
    assert said in told
    assert ("way back kept" in told) == (state is ReembeddingState.FLIPPED)
    assert f"state {state.in_words}, since" in told


def test_spaces_of_one_model_are_told_apart() -> None:
    assert _row(RAMPING)[3:5] == ("org/old", "org/new")
    assert _row(replace(RAMPING, to_model="org/old"))[3:5] == ("org/old (aaaaaaaaaaaa)", "org/old (bbbbbbbbbbbb)")
