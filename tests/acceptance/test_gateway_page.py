"""The gateway's page in a real browser: what a person sees, in light and dark, on a telephone and on a screen.

``SCREENSHOTS=docs/images pytest tests/acceptance/test_gateway_page.py`` takes the picture of docs/gateway.md again.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from chunkmill import Chunk
from chunkmill.embedded import StackStatus
from chunkmill.monitor import reports
from tests.conftest import fresh_settings
from tests.support.gateway_scene import GatewayScene, gateway_scene
from tests.support.gateways import KEY, StandInWorker, stand_in_worker
from tests.support.waiting import until

HOSTILE = '<img src=x onerror="window.hacked=1">\'\u202e'
WIDTHS = (360, 1400)
PASSAGES = (
    ("grinding", "The upper stone turns over the lower one, and the grain between them becomes flour."),
    ("wind", "A post mill is turned as a whole until its sails face the wind."),
    ("water", "An overshot wheel takes the water from above and uses its weight rather than its speed."),
    ("flour", "Freshly ground flour is warm. It rests for some days before it is baked."),
    ("steel", "Roller mills of steel replaced stones within thirty years, because they never need dressing."),
    ("miller", "The miller was paid in kind: a sixteenth of what was ground stayed in the mill."),
)


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings:
        rich = settings.model_copy(update={"openai_monthly_budget_usd": Decimal(25)})
        with gateway_scene(rich) as made:
            yield made


@pytest.fixture(scope="module")
def worker(scene: GatewayScene) -> Iterator[StandInWorker]:
    with stand_in_worker(scene.db) as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium has no sandbox for root, and the only pages are the gateway's
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


def look(browser: Any, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)


def take_picture(browser: Any, path: Path) -> None:
    """The page in light and in dark, side by side."""
    from PIL import Image

    taken = []
    for scheme in ("light", "dark"):
        look(browser, 1060, scheme)
        answer = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        taken.append(Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB"))
    both = Image.new("RGB", (sum(picture.width for picture in taken), max(picture.height for picture in taken)))
    for i, one_picture in enumerate(taken):
        both.paste(one_picture, (i * taken[0].width, 0))
    both.save(path, optimize=True)


def test_what_a_person_sees(scene: GatewayScene, worker: StandInWorker, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    passages = [Chunk(f"{i}", text, {"topic": topic, "page": 12 + i}) for i, (topic, text) in enumerate(PASSAGES)]
    library = scene.client.enqueue(passages, collection="library")
    scene.embed(library.id)
    half = scene.client.enqueue(
        [*passages, *(Chunk(f"n{i}", f"A note about mills, number {i}") for i in range(5))], collection="field-notes"
    )
    refused = [*(Chunk(f"b{i}", "") for i in range(3)), Chunk("well", "A passage that can be embedded")]
    mixed = scene.client.enqueue(refused, collection="imported-archive", on_invalid="skip")
    scene.client.cancel(mixed.id)
    today = datetime.now(UTC).date()
    scene.client.correct_charge("7.42", route="openai", day=today, reason="an invoice", author="the test")
    with scene.db.begin() as conn:
        gpu = reports.Report(
            "gpu-1", "local", "gpu-0@mill-1", "cuda:0", datetime.now(UTC) - timedelta(hours=7), 60, 49_520, 6_200_000,
            6_300_000, 51.0, 2, 0.93, 21 << 30, 80 << 30,
        )  # fmt: skip
        reports.write(conn, gpu)

    def shown() -> str:
        return str(browser.execute_script("return document.body ? document.body.innerText : ''"))

    def fits() -> None:
        wide = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        needed, there = browser.execute_script(wide)
        assert needed <= there, f"{browser.current_url} needs {needed} pixels of {there}"

    def fits_everywhere() -> None:
        for width in WIDTHS:
            look(browser, width, "dark")
            fits()

    # Without a key there is a form, and nothing else.
    browser.get(scene.running.url)
    assert "Log in" in shown()
    assert "library" not in browser.page_source
    fits_everywhere()
    browser.find_element(By.ID, "key").send_keys("cmk_wrong")
    browser.find_element(By.CSS_SELECTOR, ".primary").click()
    until(lambda: "wrong" in shown())
    # The address that a start prints has the key, which does not stay in the address bar.
    browser.get(f"{scene.running.url}/?key={KEY}")
    assert browser.current_url == f"{scene.running.url}/"
    (cookie,) = browser.get_cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert browser.execute_script("return document.cookie") == ""
    assert "library" in shown()
    fits_everywhere()
    if pictures := os.environ.get("SCREENSHOTS"):
        take_picture(browser, Path(pictures) / "gateway-page.png")

    # The numbers are kept fresh: nobody loads the page again.
    browser.execute_script("window.sameDocument = 1")
    assert "running" in row(browser, half.id)
    scene.embed(half.id)
    until(lambda: "completed" in row(browser, half.id))
    assert browser.execute_script("return window.sameDocument") == 1

    # What is hostile is shown as it is.
    odd = scene.client.enqueue([Chunk(HOSTILE, f"</p><script>window.hacked=1</script>{HOSTILE}", {HOSTILE: HOSTILE})],
                               collection=HOSTILE)  # fmt: skip
    scene.embed(odd.id)
    browser.get(scene.running.url)
    until(lambda: "<img src=x" in shown())
    browser.get(f"{scene.running.url}/page/search")

    def search(collection: str, query: str) -> None:
        options = Select(browser.find_element(By.ID, "collection")).options
        next(option for option in options if option.get_attribute("value") == collection).click()
        field = browser.find_element(By.ID, "query")
        field.clear()
        field.send_keys(query)
        browser.find_element(By.CSS_SELECTOR, ".searchbox button").click()

    search(HOSTILE, "<b>words</b>")
    until(lambda: "</p><script>window.hacked=1</script>" in shown())
    assert browser.find_element(By.ID, "query").get_attribute("value") == "<b>words</b>"
    fits()
    assert browser.execute_script("return window.hacked") is None
    search("library", "how is a mill turned into the wind?")
    until(lambda: "A post mill" in shown())
    fits_everywhere()

    browser.get(f"{scene.running.url}/page/jobs/{mixed.id}")
    assert "empty_text" in shown()
    fits_everywhere()
    browser.find_element(By.CSS_SELECTOR, ".actions button").click()  # retry
    until(lambda: "running" in shown())
    scene.embed(mixed.id)
    until(lambda: "completed" in shown())  # by events, and then a reload

    browser.get(f"{scene.running.url}/docs")
    browser.execute_script("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    fits_everywhere()
    browser.get(scene.running.url)
    browser.find_element(By.CSS_SELECTOR, ".top .link").click()
    until(lambda: "Log in" in shown())
    assert browser.get_cookies() == []
    # A style or a script that the policy refuses is an error in the console.
    said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in said if " 401 " not in message] == []


def row(browser: Any, job_id: int) -> str:
    script = """
        const link = `a[href="/page/jobs/${arguments[0]}"]`;
        return [...document.querySelectorAll("tr")].find((row) => row.querySelector(link)).innerText;
    """
    return str(browser.execute_script(script, job_id))


def test_the_page_works_without_javascript(scene: GatewayScene) -> None:
    """Forms and links alone: what a browser without JavaScript sends."""
    with scene.running.client(None) as http:
        own = {"origin": scene.running.url}
        answer = http.post("/page/login", data={"key": KEY}, headers=own, follow_redirects=True)
        assert "Overview" in answer.text
        refused = http.post("/page/search", data={"collection": "docs", "query": ""}, headers=own)
        assert (refused.status_code, "docs" in refused.text) == (200, True)
