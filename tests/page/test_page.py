"""An operator in a real Chromium watches `make sim`'s fleet, finds out why, and acts by hand."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.waiting import wait_for

playwright: Any = pytest.importorskip("playwright.sync_api", reason="make test-page")
axe: Any = pytest.importorskip("axe_playwright_python.sync_playwright", reason="make test-page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="make test-page installs chromium")

SHOTS = ROOT / "build" / "page-shots"
PAINT_MS = 1000.0
"""Milliseconds to the first paint of content."""


@pytest.fixture(scope="module")
def autoscaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the autoscaler of a `make sim` that is under way."""
    log = tmp_path_factory.mktemp("sim") / "log"
    command = [sys.executable, str(ROOT / "sim.py"), "--local", "--seed", "7", "--num-iterations", "400"]
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield wait_for_address(child, log)
    finally:
        child.terminate()
        child.wait(60)
    assert "left behind: nothing" in log.read_text() or child.returncode != 0


def wait_for_address(child: "subprocess.Popen[bytes]", log: Path) -> str:
    while child.poll() is None:
        found = re.search(r"autoscaler: (http\S+)", log.read_text())
        if found:
            return found[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
    raise AssertionError(log.read_text())


class Operator:
    """A browser on the page, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, **more: Any) -> None:
        self.url = url
        self.context = browser.new_context(**more)
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.on("request", self._see)
        self.page.goto(f"{url}/")
        self.page.wait_for_selector("#instances tbody tr")

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def _see(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.foreign.append(request.url)

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SHOTS / f"{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def operator(browser: Any, autoscaler: str) -> Iterator[Operator]:
    found = Operator(browser, autoscaler, viewport={"width": 1400, "height": 900})
    yield found
    assert found.console == []
    assert found.foreign == []
    found.context.close()


def instances(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/instances", timeout=10) as answer:  # noqa: S310 loopback
        found: list[dict[str, Any]] = json.loads(answer.read())["instances"]
        return found


def test_the_first_paint_comes_soon_and_the_strip_is_filled(operator: Operator) -> None:
    script = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    assert operator.page.evaluate(script) < PAINT_MS
    operator.page.locator("#s-hot", has_text="/").wait_for()
    assert "live" in operator.page.locator("#live").inner_text()
    assert operator.page.locator(".uplot canvas").count() == 4


def test_an_operator_finds_why_an_instance_is_as_it_is(operator: Operator) -> None:
    row = operator.page.locator("#instances tbody tr").first
    row.locator("button").click()
    opened = operator.page.locator("tr.opened")
    opened.wait_for()
    assert "because:" in opened.inner_text()
    opened.locator(".timeline i").first.wait_for(state="attached")
    assert row.locator("button").get_attribute("aria-expanded") == "true"


def test_an_operator_drains_one_by_hand_after_being_asked(operator: Operator) -> None:
    page = operator.page
    page.fill("#find", "hot")
    page.locator("#instances tbody tr .state.hot").first.wait_for()
    name = page.locator("#instances tbody tr", has=page.locator(".state.hot")).first.locator("button")
    number = int(name.inner_text())
    name.click()
    page.get_by_role("button", name="Drain …").click()
    assert str(number) in page.locator("#ask-what").inner_text()
    with page.expect_response(lambda r: "/drain" in r.url) as answer:
        page.get_by_role("button", name="Yes, do it").click()
    assert answer.value.status == 200
    page.fill("#find", "")
    page.locator("#decisions", has_text="a person takes it out of service").wait_for()
    wait_for(
        "the instance to be out of service",
        lambda: {i["id"]: i["state"] for i in instances(operator.url)}[number] != "hot",
    )


def test_a_click_on_a_decision_marks_its_moment(operator: Operator) -> None:
    operator.page.locator("#decisions > li button").first.click()
    assert operator.page.locator("#decisions > li[aria-current=true]").count() == 1


def test_it_can_be_used_by_keyboard_and_screen_reader(operator: Operator) -> None:
    operator.page.locator("#instances tbody tr button").first.focus()
    operator.page.keyboard.press("Enter")
    operator.page.locator("tr.opened").wait_for()
    found = axe.Axe().run(operator.page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_pictures_of_it_light_dark_and_on_a_phone(browser: Any, autoscaler: str) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "light": {"viewport": {"width": 1400, "height": 900}},
        "dark": {"viewport": {"width": 1400, "height": 900}, "color_scheme": "dark"},
        "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5},
    }
    for name, more in kinds.items():
        operator = Operator(browser, autoscaler, **more)
        operator.page.locator(".uplot canvas").nth(2).wait_for()
        operator.shot(name)
        wide = operator.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name}: the page scrolls sideways by {wide} px"
        operator.context.close()


def test_a_page_of_another_server_cannot_act(browser: Any, autoscaler: str) -> None:
    page = browser.new_context().new_page()
    page.goto("data:text/html,<title>elsewhere</title>")
    one = instances(autoscaler)[0]
    url = f"{autoscaler}/instances/{one['id']}/destroy"
    page.evaluate("url => fetch(url, {method: 'POST', mode: 'no-cors'}).catch(e => e.message)", url)
    assert one["id"] in [i["id"] for i in instances(autoscaler)]
    assert {i["id"]: i["state"] for i in instances(autoscaler)}[one["id"]] not in ("destroying", "failed")


def test_an_operator_asks_what_another_goal_would_have_made_and_sees_both_sides(operator: Operator) -> None:
    page = operator.page
    page.fill("#what-if input[name=goal]", "99.9")
    page.click("#what-if button")
    dollars = page.locator("#what-if-sides tbody tr", has_text="dollars a day").locator("td")
    for column in (0, 1):
        dollars.nth(column).filter(has_text="$").wait_for(timeout=180_000)
    assert page.locator("#what-if-says").inner_text() == ""


def test_an_operator_looks_at_the_market_and_at_how_fast_answers_came(operator: Operator) -> None:
    page = operator.page
    page.click("#market-look")
    page.locator("#market tbody tr").first.wait_for()
    assert "RTX" in page.locator("#market tbody").inner_text()
    page.click("#latencies button[data-which=whole]")
    assert page.locator("#latencies button[data-which=whole]").get_attribute("aria-pressed") == "true"
    page.locator("#c-latency canvas").wait_for()


def test_an_operator_changes_the_goal_after_being_asked_and_it_is_written_down(operator: Operator) -> None:
    page = operator.page
    page.fill("#goal-plain input", "99.5")
    page.click("#goal-plain button")
    page.locator("#ask", has_text="99.5 %").wait_for()
    page.click("#ask button[value=yes]")
    page.locator("#s-time-more", has_text="goal 99.5 %").wait_for()
    page.locator("#decisions li", has_text="policy: objective with goal 0.995").first.wait_for()


def test_an_operator_is_alerted_when_no_machine_is_hot_while_requests_come(operator: Operator) -> None:
    page = operator.page
    wait_for("a hot instance", lambda: [i for i in instances(operator.url) if i["state"] == "hot"])
    for number in [i["id"] for i in instances(operator.url) if i["id"] and i["state"] != "destroying"]:
        url = f"{operator.url}/instances/{number}/destroy"
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10).close()  # noqa: S310
    page.locator("#trouble", has_text="No instance is hot").wait_for(timeout=30_000)
    page.locator("#trouble", has_text="No instance is hot").wait_for(state="hidden", timeout=120_000)
