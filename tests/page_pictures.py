"""Draw the pictures of the operator's page in docs/, of a `make sim` that is well under way.

python -m tests.page_pictures
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tests.page.test_page import CHROMIUM, playwright, wait_for_address
from tests.paths import ROOT
from tests.waiting import wait_for

KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "page": ({"viewport": {"width": 1400, "height": 900}}, 1150),
    "page-dark": ({"viewport": {"width": 1400, "height": 900}, "color_scheme": "dark"}, 1150),
    "page-phone": ({"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5}, 1500),
}
"""Name of the file in docs/ -> the browser, and how many pixels of the page from its top."""

HOT, ANSWERS = 3, 60
"""Instances and answers of the last minute that are wanted on the pictures."""


def main() -> None:
    """Start a run, wait until its fleet has grown, and take the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, str(ROOT / "sim.py"), "--local", "--seed", "7", "--num-iterations", "400"]
        with log.open("w") as out:
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        try:
            url = wait_for_address(child, log)
            wait_for("a fleet that has grown", lambda: is_grown(url), 240.0)
            with playwright.sync_playwright() as p:
                browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
                for name, (kind, height) in KINDS.items():
                    page = browser.new_context(**kind).new_page()
                    page.goto(f"{url}/")
                    page.wait_for_selector("#instances tbody tr")
                    page.wait_for_timeout(2500)
                    top = {"x": 0, "y": 0, "width": kind["viewport"]["width"], "height": height}
                    page.screenshot(path=str(ROOT / "docs" / f"{name}.png"), full_page=True, clip=top)
                browser.close()
        finally:
            child.terminate()
            child.wait(60)


def is_grown(url: str) -> bool:
    """Return whether enough is hot and was answered."""
    with urllib.request.urlopen(f"{url}/overview", timeout=10) as answer:  # noqa: S310 loopback
        latest = json.loads(answer.read())["latest"]
    return latest is not None and latest["hot"] >= HOT and latest["answers"] >= ANSWERS


if __name__ == "__main__":
    main()
