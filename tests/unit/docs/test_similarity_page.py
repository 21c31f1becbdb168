"""The examples of docs/similarity.md are run, from top to bottom."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs/similarity.md"
FENCE = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_example_of_the_page_gives_what_it_shows() -> None:
    examples = FENCE.findall(PAGE.read_text())
    assert len(examples) >= 7
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest("\n".join(examples), {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)
