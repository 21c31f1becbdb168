"""The page of a map in a real Chromium: it draws, it tells the chunk under the mouse, and it loads nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkmill.domain.maps import CollectionMap, MapMethod

EVIL = "<img src=x onerror=document.title='taken'>"
POINTS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
COLOURED = """
const at = document.querySelector("canvas"), data = at.getContext("2d").getImageData(0, 0, at.width, at.height).data;
const seen = {};
for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] > 200) { const c = [data[i], data[i + 1], data[i + 2]].join(); seen[c] = (seen[c] || 0) + 1; }
return Object.keys(seen).length;
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium has no sandbox for root, and the only page is ours
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--window-size=900,600",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


@pytest.mark.slow
def test_the_page_draws_tells_and_loads_nothing(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    drawn = CollectionMap(
        "docs", "m", "a" * 64, MapMethod.PCA, "lang", 4, (0.3, 0.2), tuple(f"doc-{i}{EVIL}" for i in range(4)),
        ("de", "en", "de", EVIL), POINTS, tuple(f"text {i} {EVIL}" for i in range(4)),
    )  # fmt: skip
    page = drawn.save(tmp_path / "map.html")
    browser.get(page.as_uri())
    assert browser.title == "Collection docs, coloured by lang in its metadata"
    assert browser.execute_script(COLOURED) >= 3
    legend = browser.find_elements("css selector", "#legend button")
    assert [button.text.split("\n") for button in legend] == [["de", "2"], [EVIL, "1"], ["en", "1"]]

    canvas, tip = browser.find_element("tag name", "canvas"), browser.find_element("id", "tip")

    def over(i: int) -> str:
        """What is told at the place of a point."""
        x, y = browser.execute_script(f"return pixel({i}, frame())")
        box = canvas.size
        ActionChains(browser).move_to_element_with_offset(
            canvas, round(x - box["width"] / 2), round(y - box["height"] / 2)
        ).perform()
        return str(tip.text)

    assert over(2) == f"doc-2{EVIL}\nlang: de\ntext 2 {EVIL}"
    assert over(3) == f"doc-3{EVIL}\nlang: {EVIL}\ntext 3 {EVIL}"
    legend[1].click()  # hides the point
    assert over(3) == ""
    browser.execute_script("zoom = 2; left = 0; top_ = -canvas.clientHeight; draw()")
    assert over(0).startswith("doc-0")
    assert browser.title == "Collection docs, coloured by lang in its metadata"  # no image was made of an id
    assert browser.find_elements("tag name", "img") == []
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Chromium's own first page is none of ours.
    ours = {params["request"]["url"] for params in requests if params["documentURL"] == page.as_uri()}
    assert ours == {page.as_uri()}
