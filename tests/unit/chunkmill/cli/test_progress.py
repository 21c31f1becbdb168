"""The bar of a piece of work that goes on under another name."""

from __future__ import annotations

import io

from rich.console import Console

from chunkmill.cli.output import Screen
from chunkmill.cli.progress import Bar


def test_what_was_counted_under_one_name_does_not_stay_under_the_next() -> None:
    screen, seen = Screen(as_json=False), io.StringIO()
    screen.err = Console(width=80, force_terminal=True, file=seen, color_system=None)
    with Bar(screen, "docs: filling") as bar:
        assert bar._progress is not None
        bar.update(8, 41, "texts")
        bar._progress.refresh()
        assert "8/41 texts" in seen.getvalue()
        seen.truncate(0)
        bar.stage("docs: judging")
        bar._progress.refresh()
    last = seen.getvalue().rpartition("docs: judging")[2]
    assert ("docs: judging" in seen.getvalue(), "8/41" in last) == (True, False)
