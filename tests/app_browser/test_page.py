"""The page in headless Chromium: clicked through, by keyboard alone, and read by axe.

`make test-ui` runs these. CHROMIUM names another browser's executable than Playwright's own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app_client import TOKEN, Client, served
from lifelong import runs
from lifelong.app import workspace
from lifelong.config import Experiment, Overrides, RunConfig

PAGES = (
    "/memory",
    "/items/7",
    "/items/7/neighbours",
    "/review",
    "/learning",
    "/compare",
    "/changes",
    "/forget?items=7",
    "/nothing",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "digits"
    config = RunConfig(
        Experiment(benchmark="split-digits", prior="kprior", memory=30), Overrides(epochs=3)
    )
    plan = runs.prepare(config)
    runs.create(plan, folder)
    runs.execute(plan, folder)
    return folder


@pytest.fixture
def run(learned: Path, tmp_path: Path) -> Path:
    shutil.copytree(learned, tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def client(run: Path) -> Iterator[Client]:
    with served(workspace(run)) as client:
        yield client


@pytest.fixture
def page(client: Client, browser: Browser) -> Iterator[Page]:
    yield from opened(client, browser)


def opened(client: Client, browser: Browser, **options: Any) -> Iterator[Page]:
    context = browser.new_context(base_url=client.origin, **options)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"/?token={TOKEN}")
    yield page
    context.close()
    wrong = [text for text in said if "404" not in text]  # of addresses that are not there
    assert not wrong, wrong


def test_sort_filter_open(page: Page) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("Memory")
    expect(page.locator(".gallery li")).to_have_count(60)
    page.get_by_label("Sort by").select_option("lambda")
    page.get_by_label("Class").select_option("3")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("15 fit the filter")).to_be_visible()
    expect(page.locator(".gallery li")).to_have_count(15)
    for picture in page.locator(".gallery img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth === 96)")
    page.locator(".gallery a").first.click()
    expect(page.get_by_role("heading", name="What the model believed")).to_be_visible()


def test_drop_and_undo(page: Page) -> None:
    boxes = page.locator(".gallery input")
    boxes.nth(0).check()
    boxes.nth(4).click(modifiers=["Shift"])
    expect(page.get_by_text("5 chosen")).to_be_visible()
    page.get_by_role("button", name="Drop").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Changes")
    page.get_by_role("link", name="Memory", exact=True).click()
    expect(page.get_by_text("145 examples are remembered")).to_be_visible()
    page.get_by_role("link", name="Changes").click()
    page.get_by_role("button", name="Make version 1 today's").click()
    page.get_by_role("link", name="Memory", exact=True).click()
    expect(page.get_by_text("150 examples are remembered")).to_be_visible()


def test_forget_and_see_the_result(page: Page) -> None:
    page.locator(".gallery input").nth(2).check()
    page.get_by_role("button", name="Forget").click()
    expect(page.get_by_text("This is final.")).to_be_visible()
    page.get_by_label("who asked").fill("a test")
    page.get_by_label("Type forget").fill("forget")
    page.get_by_role("button", name="Forget for good").click()
    expect(page.get_by_text("Done", exact=True)).to_be_visible(timeout=60_000)
    expect(page.get_by_role("row", name="Accuracy on the tests")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Certificate").click()
    text = Path(download.value.path()).read_text()
    assert "a test" in text
    page.get_by_role("link", name="Memory", exact=True).click()
    expect(page.get_by_text("149 examples are remembered")).to_be_visible()


def test_compare_and_learning(page: Page, run: Path) -> None:
    shutil.copytree(run, run.with_name("another"))
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("row", name="another")).to_be_visible()
    page.get_by_role("link", name="Learning").click()
    expect(page.locator("figure")).to_have_count(2)


def test_review_relabel_and_undo(page: Page) -> None:
    page.get_by_role("link", name="Review").click()
    page.get_by_role("button", name="Measure it").click()
    expect(page.get_by_text("Done", exact=True)).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Review labels").click()
    expect(page.get_by_text("move the network's outputs most")).to_be_visible()
    expect(page.get_by_role("button", name="Drop")).to_be_disabled()
    first = page.locator(".to select").first
    old = first.locator("option").nth(0).inner_text()
    new = first.locator("option").nth(1).get_attribute("value")
    first.select_option(new)
    page.get_by_role("button", name="Relabel").click()
    expect(page.get_by_text("Done", exact=True)).to_be_visible(timeout=60_000)
    expect(page.get_by_text("Of the 1 relabelled")).to_be_visible()
    page.get_by_role("link", name="Changes", exact=True).first.click()
    page.get_by_role("button", name="Make version 1 today's").click()
    page.get_by_role("link", name="Review").click()
    assert page.locator(".to select").count() == 24
    assert old != new
    page.locator(".gallery a").first.click()
    page.get_by_role("link", name="Its neighbours").click()
    expect(page.locator(".gallery li")).to_have_count(12)


def test_calibration_and_fidelity(page: Page) -> None:
    page.goto("/learning")
    page.get_by_role("button", name="Measure them").click()
    expect(page.get_by_text("Done", exact=True)).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Learning").first.click()
    expect(page.locator("figure")).to_have_count(4)
    for drawing in page.locator("figure > svg").all():
        assert drawing.locator("title").text_content()
        assert drawing.locator("desc").text_content()


def test_progress_is_live(page: Page, run: Path) -> None:
    result, accuracy = run / "result.json", run / "seed-0" / "accuracy.json"
    held = result.read_text(), accuracy.read_text()
    result.unlink()
    accuracy.unlink()
    (run / "log.txt").write_text("2026-01-01 seed 0: task 1, accuracy so far 0.5000\n")
    page.goto("/learning")
    expect(page.get_by_text("seed 0: 1 tasks learned, 50.00 %")).to_be_visible()
    with (run / "log.txt").open("a") as log:
        log.write("2026-01-01 seed 0: task 2, accuracy so far 0.7500\n")
    expect(page.get_by_text("seed 0: 2 tasks learned, 75.00 %")).to_be_visible(timeout=5_000)
    accuracy.write_text(held[1])
    result.write_text(held[0])
    expect(page.get_by_text("At the end, means over 1 seed")).to_be_visible(timeout=5_000)


def test_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_text("To the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.name || document.activeElement.tagName")
        if focused == "items":
            break
    assert focused == "items"
    page.keyboard.press("Space")
    expect(page.get_by_text("1 chosen")).to_be_visible()
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent").strip() == "Drop":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Changes")


def test_without_scripts(client: Client, browser: Browser) -> None:
    for page in opened(client, browser, java_script_enabled=False):
        page.locator(".gallery input").nth(0).check()
        page.get_by_role("button", name="Drop").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Changes")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everyone_can_read_it(
    client: Client, browser: Browser, width: int, scheme: Any, tmp_path: Path
) -> None:
    """No finding of axe, and nothing that is wider than the window."""
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    client.post("/measure", [])
    assert client.job()["state"] == "done"
    for page in opened(client, browser, **options):
        for path in (*PAGES, "/jobs/1"):
            page.goto(path)
            found = Axe().run(page).response["violations"]
            told = [
                (v["id"], v["impact"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found
            ]
            assert not [v for v in told if v[1] in ("serious", "critical")], (path, told)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
            name = path.strip("/").replace("/", "-").replace("?", "-").replace("=", "-")
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png")


def test_nothing_is_asked_of_elsewhere(client: Client, browser: Browser) -> None:
    asked: list[str] = []
    for page in opened(client, browser):
        page.on("request", lambda request: asked.append(request.url))
        for path in PAGES:
            page.goto(path)
        assert all(url.startswith((client.origin, "data:")) for url in asked), asked
