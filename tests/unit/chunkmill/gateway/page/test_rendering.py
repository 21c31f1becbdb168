"""What the page makes of values: escaped, short, and without what steers a screen."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from chunkmill.gateway.page import rendering
from chunkmill.gateway.page.rendering import ago, beginning, html, marked, share_of, short_number, static

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "says"), [(0, "0 s ago"), (59, "59 s ago"), (61, "1 min ago"), (7200, "2 h ago"), (90_000, "1 d ago")]
)
def test_a_moment_is_said_in_one_unit(seconds: float, says: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == says
    assert ago(None, NOW) == "never"


@pytest.mark.parametrize(
    ("number", "says"),
    [(0, "0"), (9_999, "9,999"), (12_345, "12.3 k"), (999_000, "999 k"), (4_560_000, "4.56 M"), (7e9, "7 G")],
)
def test_a_number_is_short(number: float, says: str) -> None:
    assert short_number(number) == says


def test_a_budget_is_a_share() -> None:
    assert share_of(Decimal(5), None) is None
    assert share_of(Decimal(5), Decimal(20)) == 0.25
    assert share_of(Decimal(50), Decimal(20)) == 1.0
    assert share_of(Decimal(0), Decimal(0)) == 1.0


def test_what_turns_a_text_round_is_not_shown() -> None:
    assert "\u202e" not in beginning("a\u202eb")
    assert beginning("x" * 1000) == "x" * 600 + "…"


def test_every_value_is_escaped() -> None:
    answer = html("problem.html", status=400, message="<script>'\"&", is_known=False)
    assert b"<script>'" not in answer.body
    assert b"&lt;script&gt;&#39;&#34;&amp;" in answer.body
    assert marked("a `<b>` & `c") == "a <code>&lt;b&gt;</code> &amp; c"
    assert rendering._environment().autoescape is True


def test_pages_have_no_inline_script_or_style_and_ask_nobody_else() -> None:
    """What the policy would refuse is not in the templates, and the policy names no other host."""
    policy = rendering.HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    for name in rendering._environment().list_templates():
        source = rendering._environment().loader.get_source(rendering._environment(), name)[0]  # type: ignore[union-attr]
        assert " style=" not in source, name
        assert not re.search(r"\son\w+=", source), name
        assert "<script>" not in source, name
        assert "|safe" not in source, name
        assert "http" not in source.replace("https://", "http://").replace('xmlns="http://', ""), name
    for name in rendering.STATIC:
        assert static(name)
