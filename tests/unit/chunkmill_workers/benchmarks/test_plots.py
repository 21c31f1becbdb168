"""The pictures of the results that are in the repository."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_two_numbers_of_an_axis_touch(path: Path) -> None:
    from matplotlib import pyplot

    from chunkmill_workers.benchmarks import plots  # Matplotlib, whose import takes most of a second

    result = json.loads(path.read_text(encoding="utf-8"))
    for benchmark, paint in plots.PICTURES.values():
        if not re.fullmatch(rf"{benchmark}-(amd|intel)-.*", path.stem) or (figure := paint(result)) is None:
            continue
        figure.canvas.draw()
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
            shown = [label for label in labels if label.get_text() and low <= label.get_position()[0] <= high]
            boxes = sorted(
                ((label.get_window_extent(), label.get_text()) for label in shown), key=lambda box: box[0].x0
            )
            touching = [(left[1], right[1]) for left, right in pairwise(boxes) if left[0].overlaps(right[0])]
            assert touching == []
        pyplot.close(figure)


def test_there_are_results() -> None:
    assert any(path.stem.startswith("search-") for path in FILES)
