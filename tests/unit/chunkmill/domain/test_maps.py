"""A map shows what was asked for, and nothing that a chunk says becomes a part of its page."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from chunkmill.domain.maps import COLOURS, NOTHING, OTHERS, CollectionMap, MapMethod, Value, legend_of, value_of
from chunkmill.errors import InvalidInput

EVIL = "</script><script>alert(1)</script><!--"


def drawn(values: list[Value], *, by: str | None = "lang", texts: tuple[str, ...] | None = None) -> CollectionMap:
    n = len(values)
    points = np.random.default_rng(1).standard_normal((n, 2))
    ids = tuple(f"doc-{i} {EVIL}" for i in range(n))
    return CollectionMap(
        "docs " + EVIL, "m", "a" * 64, MapMethod.PCA, by, 9_000, (0.2, 0.1), ids, tuple(values), points, texts
    )


def data_of(page: str) -> dict[str, object]:
    (packed,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    made: dict[str, object] = json.loads(packed)
    return made


def test_the_most_frequent_values_get_colours_and_the_others_share_one() -> None:
    values: list[Value] = ["b", "a", "a", None, *(f"rare-{i}" for i in range(9)), "b", "a"]
    legend = legend_of(values)
    assert legend.labels[:2] == ("a", "b")
    assert legend.labels[-2:] == ("2 other values", "no value")
    assert legend.colours == (*COLOURS, OTHERS, NOTHING)
    assert [legend.labels[group] for group in legend.groups[:4]] == ["b", "a", "a", "no value"]
    assert sum(legend.counts) == len(values)
    assert legend.counts[0] == 3


def test_many_numbers_have_a_scale_and_few_are_names() -> None:
    legend = legend_of([float(i) for i in range(11)] + [None])
    assert legend.bounds == (0.0, 10.0)
    assert legend.groups.tolist()[:2] == [0, 26]
    assert legend.groups.tolist()[-2:] == [255, 256]
    assert (legend.colours[0], legend.colours[255], legend.colours[256]) == ("#440154", "#fde725", NOTHING)
    assert legend_of([1, 2, 1]).labels == ("1", "2")
    assert legend_of([True, False, True]).labels == ("true", "false")
    assert legend_of([-1e308, *range(9), 1e308]).groups.tolist()[::10] == [0, 255]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("string", "de", "de"), ("number", "5", 5), ("number", "-5.5", -5.5), ("boolean", "true", True),
        ("null", None, None), (None, None, None), ("array", '["a"]', '["a"]'), ("number", "9" * 40, "9" * 40),
        ("number", "1" + "0" * 99, "1" + "0" * 99),
    ],
)  # fmt: skip
def test_a_value_keeps_its_kind(kind: str | None, text: str | None, value: Value) -> None:
    made = value_of(kind, text)
    assert made == value
    assert type(made) is type(value)


def test_the_page_loads_nothing_and_no_id_can_leave_the_data() -> None:
    page = drawn(["de", EVIL, "de"]).html()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)\s*=|url\(|https?://|@import", page) == []
    data = data_of(page)
    assert data["ids"] == [f"doc-{i} {EVIL}" for i in range(3)]
    assert data["texts"] is None
    marked = dataclasses.replace(drawn(["de"]), collection="{{data}} {{title}}").html()
    assert data_of(marked)["title"] == "Collection {{data}} {{title}}, coloured by lang in its metadata"
    assert "<title>Collection {{data}} {{title}}, coloured by lang in its metadata</title>" in marked
    assert min(data["x"]) == 0  # type: ignore[call-overload]
    assert max(data["x"]) == 65_535  # type: ignore[call-overload]


def test_texts_are_in_the_page_only_if_they_were_asked_for() -> None:
    assert "a secret text" in drawn(["a"], texts=("a secret text",)).html()
    assert data_of(drawn(["a"]).html())["texts"] is None
    assert "secret" not in repr(drawn(["a"], texts=("a secret text",)))


def test_pictures_are_written(tmp_path: Path) -> None:
    numbers = drawn([1.5 * i for i in range(20)])
    assert numbers.save(tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    made = drawn(["a", "$b$", None])
    svg = made.save(str(tmp_path / "map.svg")).read_text()
    ElementTree.fromstring(svg)  # noqa: S314 - it is our own
    assert "9,000 texts" in svg
    for name in (r"a$\frac{$", "b$c$"):  # no formula, and a formula that matplotlib cannot read
        odd = dataclasses.replace(drawn([name, name, "d"]), collection=name, by=name)
        written = odd.save(tmp_path / "odd.svg").read_text()
        assert written.count(name) == 4, "twice in the title, above the legend and in it"
        assert odd.save(tmp_path / "odd.png").stat().st_size > 0
    assert made.save(tmp_path / "map.svg").read_text() == svg
    assert (tmp_path / "map.html").exists() is False
    assert "<canvas" in made.save(tmp_path / "map.HTML").read_text()


def test_a_wrong_file_and_a_missing_library_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"must end with \.html, \.png or \.svg"):
        drawn(["a"]).save(tmp_path / "map.gif")
    with pytest.raises(InvalidInput, match="cannot be written: No such file"):
        drawn(["a"]).save(tmp_path / "nowhere" / "map.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("chunkmill.domain.figures.find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"matplotlib, which is not installed.*\.\[pictures\]"):
        drawn(["a"]).save(tmp_path / "map.png")
    assert "<canvas" in drawn(["a"]).html()


def test_a_notebook_shows_the_page_in_a_frame_of_its_own() -> None:
    frame = drawn(["a"])._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert 'sandbox="allow-scripts"' in frame
    assert "<script" not in frame
