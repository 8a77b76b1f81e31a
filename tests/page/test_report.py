"""The report of a run as a page, opened from the disk in a real Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sim
from tests.paths import ROOT

playwright: Any = pytest.importorskip("playwright.sync_api", reason="make test-page")
axe: Any = pytest.importorskip("axe_playwright_python.sync_playwright", reason="make test-page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="make test-page installs chromium")

SHOTS = ROOT / "build" / "page-shots"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an hour in virtual time with a fleet that begins too small."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    flags = ("--trace", "synthetic:days=0.05,swing=0", "--hot", "1", "--pool", "3", "--seed", "1", "--quiet")
    assert sim.main(["--virtual", *flags, "--html", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Reader:
    """A browser on the report, and what went wrong in it."""

    def __init__(self, browser: Any, report: Path, **more: Any) -> None:
        self.page = browser.new_context(**more).new_page()
        self.console: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.console.append(m.text))
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(report.as_uri())
        self.page.locator(".uplot canvas").nth(3).wait_for()

    def latest(self, chart: str) -> str:
        return str(self.page.locator(f"#{chart} .u-legend").inner_text())


def test_it_asks_nobody_for_anything_and_complains_of_nothing(browser: Any, report: Path) -> None:
    reader = Reader(browser, report)
    assert reader.console == []
    assert [url for url in reader.asked if not url.startswith(("data:", report.as_uri()))] == []
    assert "too small" in reader.page.locator("#trouble").inner_text()
    assert "TTFT" in reader.page.locator("#latency").inner_text()
    assert "load offered" in reader.latest("c-fleet")


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_again(browser: Any, report: Path) -> None:
    reader = Reader(browser, report, viewport={"width": 1400, "height": 1400})
    over = reader.page.locator("#c-fleet .u-over")
    box = over.bounding_box()
    whole = reader.latest("c-usd")
    reader.page.mouse.move(box["x"] + 100, box["y"] + 50)
    reader.page.mouse.down()
    reader.page.mouse.move(box["x"] + 300, box["y"] + 50, steps=5)
    assert reader.latest("c-usd") != whole, "the cursor goes through all charts"
    reader.page.mouse.up()
    axis = "[...document.querySelectorAll('#c-usd canvas')].map(c => c.toDataURL()).join()"
    zoomed = reader.page.evaluate(axis)
    over.dblclick(position={"x": 10, "y": 10})
    assert reader.page.evaluate(axis) != zoomed


def test_charts_of_one_time_stand_below_each_other(browser: Any, report: Path) -> None:
    reader = Reader(browser, report)
    boxes = [
        reader.page.locator(f"#{name} .u-over").bounding_box() for name in ("c-fleet", "c-requests", "c-wait")
    ]
    assert len({(round(b["x"]), round(b["width"])) for b in boxes}) == 1


def test_light_dark_and_on_a_phone(browser: Any, report: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "light": {"viewport": {"width": 1400, "height": 900}},
        "dark": {"viewport": {"width": 1400, "height": 900}, "color_scheme": "dark"},
        "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
    }
    for name, more in kinds.items():
        page = Reader(browser, report, **more).page
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(SHOTS / f"report-{name}.png"), full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        found = axe.Axe().run(page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], name
