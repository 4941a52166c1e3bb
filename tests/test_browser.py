"""The report, alone and in the MLflow UI, as a browser shows it: headless Chromium, and axe."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlflow
import pytest
from pages import THREE, page
from servers import Server

from pipeline import report, tracking, views

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

why = "playwright and axe-playwright-python are not installed (tests/requirements.txt)"
sync_playwright = pytest.importorskip("playwright.sync_api", reason=why).sync_playwright
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=why).Axe
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium and no google-chrome on the PATH (apt install chromium)"
)
PHONE, DESK = {"width": 375, "height": 800}, {"width": 1280, "height": 900}
QUIET = [
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    alone = ["--no-sandbox"] if os.getuid() == 0 else []  # root has no sandbox to give
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET + alone)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of three models, as a file."""
    path = tmp_path_factory.mktemp("report") / report.NAME
    path.write_text(page(THREE), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Any]:
    """tab(address, ...) opens a page; one of ours must have no complaints."""
    contexts, complaints = [], []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def open_tab(address: str, scheme: Any = "light", size: Any = DESK) -> Page:
        context = browser.new_context(color_scheme=scheme, viewport=size)
        contexts.append(context)
        page = context.new_page()
        if address.startswith("file:"):
            page.on("console", note)
            page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert complaints == []


def luminance(page: Page, selector: str, what: str) -> float:
    """Of a computed colour, 0 black to 1 white."""
    script = f"node => getComputedStyle(node)['{what}']"
    colour = str(page.locator(selector).first.evaluate(script))
    red, green, blue = (int(value) / 255 for value in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_asks_for_nothing_and_needs_no_script(browser: Browser, address: str) -> None:
    asked: list[str] = []
    context = browser.new_context(java_script_enabled=False)
    alone = context.new_page()
    alone.on("request", lambda request: asked.append(request.url.split(":")[0]))
    alone.goto(address)
    assert alone.get_by_role("heading", level=1).is_visible()
    context.close()
    # The page itself, and the pictures that lie in it.
    assert asked[0] == "file"
    assert set(asked[1:]) <= {"data"}


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_the_page_never_scrolls_sideways(tab: Any, address: str, width: int) -> None:
    page = tab(address, size={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider than the page scrolls in a box of its own, and the box stays inside.
    boxes = page.locator(".scroll").evaluate_all(
        "nodes => nodes.map(node => node.getBoundingClientRect().right)"
    )
    assert len(boxes) > 5
    assert max(boxes) <= width


def test_the_models_stand_side_by_side_in_a_small_window(tab: Any, address: str) -> None:
    page = tab(address, size={"width": 1085, "height": 800})  # of 1,100 a scrollbar takes 15
    table = page.locator("#table .scroll").first
    assert table.evaluate("node => node.scrollWidth - node.clientWidth") == 0
    page.set_viewport_size({"width": 800, "height": 800})  # where they cannot, it shows
    assert table.evaluate("node => node.scrollWidth - node.clientWidth") > 0


def test_figures_fill_a_phone_and_their_words_can_be_read(tab: Any, address: str) -> None:
    page = tab(address, size=PHONE)
    for figure in page.locator(".charts > figure:not(.fine) svg").all():
        assert figure.evaluate("node => node.getBoundingClientRect().width") > 0.8 * PHONE["width"]
        heights = figure.locator("text").evaluate_all(
            "nodes => nodes.map(node => parseFloat(getComputedStyle(node).fontSize)"
            " * Math.hypot(node.getScreenCTM().a, node.getScreenCTM().b))"
        )
        assert min(heights) > 7.5  # pixels


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_follows_light_and_dark(tab: Any, address: str, scheme: str, dark: bool) -> None:
    page = tab(address, scheme)
    ground = luminance(page, "body", "backgroundColor")
    card = luminance(page, "section", "backgroundColor")
    texts = [luminance(page, name, "color") for name in ("body", "h2", "td", "figcaption")]
    # The words inside of the figures are in the same ink as those around them.
    texts.append(luminance(page, "svg text", "fill"))
    if dark:
        assert max(ground, card) < 0.2
        assert min(texts) > 0.6
    else:
        assert min(ground, card) > 0.9
        assert max(texts) < 0.4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(tab: Any, address: str, scheme: str, size: dict[str, int]) -> None:
    page = tab(address, scheme, size)
    page.locator("details").evaluate_all("nodes => nodes.forEach(node => { node.open = true })")
    found = Axe().run(page, options={"resultTypes": ["violations", "passes"]})
    assert found.violations_count == 0, found.generate_report()
    # It did look, also at contrast.
    assert "color-contrast" in {one["id"] for one in found.response["passes"]}


def test_axe_would_find_something(tab: Any, address: str) -> None:
    page = tab(address)
    page.locator("img").first.evaluate("node => node.removeAttribute('alt')")
    page.locator("figcaption").first.evaluate("node => { node.style.color = '#dddddd' }")
    found = Axe().run(page)
    assert {one["id"] for one in found.response["violations"]} == {"image-alt", "color-contrast"}


def test_tables_scroll_by_keyboard(tab: Any, address: str) -> None:
    page = tab(address, size=PHONE)
    table = page.locator("#table .scroll").first
    table.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#table .scroll').scrollLeft > 0")


def test_on_paper_it_is_light_and_whole(tab: Any, address: str) -> None:
    page = tab(address, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert luminance(page, "body", "backgroundColor") == 1
    assert luminance(page, "td", "color") == 0
    # What is folded on a screen is printed, and nothing that is wider is cut off.
    folded = page.locator("details table").first
    assert folded.evaluate("node => node.checkVisibility({contentVisibilityAuto: true})")
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_mlflow_ui_opens_it(tab: Any, store: mlflow.MlflowClient, server: Server) -> None:
    client = mlflow.MlflowClient(server.uri)
    run = client.create_run("0", run_name="compare")
    client.log_text(run.info.run_id, page(THREE), report.NAME)
    place = f"{server.uri}/#/experiments/0/runs/{run.info.run_id}/artifacts/{report.NAME}"
    shown = tab(place).frame_locator("iframe")
    shown.get_by_role("heading", level=1).wait_for(timeout=60_000)
    assert "CNN, KNN and LSTM" in str(shown.get_by_role("heading", level=1).text_content())
    assert shown.get_by_role("img", name="Test accuracy of each model").is_visible()


def test_the_mlflow_ui_shows_the_views(
    tab: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with tracking.start("sweep") as run:
        run.name("toy sweep")
        run.metrics({"test_accuracy": 0.91, "val_accuracy": 0.93, "cpu_seconds": 12.0})
        with tracking.start("trial", parent=run) as trial:
            trial.name("toy 000")
            trial.metrics({"val_accuracy": 0.93})
    address = f"{server.uri}{views.address(run.experiment_id)}"
    runs = tab(address, size={"width": 1900, "height": 900})
    # Sweeps alone, with the columns that the view has.
    runs.get_by_role("link", name="toy sweep").wait_for(timeout=60_000)
    assert runs.get_by_role("link", name="toy 000").count() == 0
    runs.get_by_role("columnheader", name="test_accuracy").first.wait_for()
    assert runs.get_by_text("0.91", exact=True).count() > 0
    # It has charts of its own.
    charts = tab(f"{address}&compareRunsMode=CHART", size={"width": 1900, "height": 900})
    charts.get_by_text("cpu_seconds vs. test_accuracy").first.wait_for(timeout=60_000)
