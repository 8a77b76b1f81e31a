"""What the operator's page costs: the processor of the autoscaler and of the browser while it is open.

    python -m bench.page [--instances 1,100,1000] [--seconds 20] [--json FILE]

A fleet of that size, half of it hot, takes a turn every five seconds; a real Chromium, headless, has the page
open. The share of a core is what each used of one while the page was open, less, of the autoscaler, what it
used before. `make bench-page` installs the browser.
"""

import importlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from autoscaler_server import create_app
from bench.command import bench_parser, machine, write_json
from bench.turn import TURN_S, PreparedCli, SteadyFleet, row
from engine.profiles import get_profile
from fleet.outside.start_script import render
from fleet_client.flags import run_main
from fleet_client.listening import bind_socket
from process.errors import ConfigError
from web.bridge import serve_flask
from web.keys import AccessKeys

TARGET_CORE, TARGET_PAINT_MS = 0.05, 1000.0
"""Share of a core of the autoscaler with 100 instances, and milliseconds to the first paint."""

SLOW = frozenset({"/costs", "/metrics", "/overview", "/history"})
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def serve(instances: int) -> None:
    """Serve the page of a fleet of that size until SIGTERM; print the port first."""
    rng = random.Random(1)
    script = render(get_profile("vllm-13"), "0" * 64)
    rows = [row(n, hot=n % 2 == 0, rng=rng, start=script) for n in range(instances)]
    sock = bind_socket("127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as directory:
        fleet = SteadyFleet(instances, Path(directory), PreparedCli(rows))

        def turns() -> None:
            while True:
                time.sleep(TURN_S)
                fleet.wait()
                fleet.scaler.turn()

        threading.Thread(target=turns, daemon=True).start()
        print(sock.getsockname()[1], flush=True)
        serve_flask(create_app(fleet.scaler, AccessKeys("c" * 16), TURN_S, str), sock, blocking=SLOW)


def cpu_s(pid: int) -> float:
    """Return the seconds of processor that a process and all that it started have used."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        number = int(stat.parent.name)
        if number == pid or _descends(number, pid):
            total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


def _descends(number: int, ancestor: int) -> bool:
    while number > 1:
        try:
            stat = Path(f"/proc/{number}/stat").read_text()
        except OSError:
            return False
        number = int(stat.rpartition(")")[2].split()[1])
        if number == ancestor:
            return True
    return False


def measure(instances: int, seconds: float, playwright: Any, chromium: str) -> dict[str, Any]:
    """Open the page of a fleet of that size for a while; return shares of a core and the first paint."""
    command = [sys.executable, "-m", "bench.page", "--serve", str(instances)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        time.sleep(2.0 * TURN_S)
        before = cpu_s(child.pid)
        time.sleep(seconds)
        idle = (cpu_s(child.pid) - before) / seconds
        with playwright.sync_playwright() as p:
            driver = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = driver.new_page(viewport={"width": 1400, "height": 900})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#instances tbody tr")
            paint_ms = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            page.wait_for_timeout(3000)
            server, own = cpu_s(child.pid), cpu_s(os.getpid())
            begun = time.monotonic()
            page.wait_for_timeout(seconds * 1000)
            took = time.monotonic() - begun
            server_s = cpu_s(child.pid) - server
            # The browser is ours, and so is the server: what is left is the browser's and ours.
            browser_s = cpu_s(os.getpid()) - own - server_s
            size = page.evaluate("fetch('/overview').then((a) => a.text()).then((t) => t.length)")
            driver.close()
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(20)
    return {
        "instances": instances,
        "autoscaler_core": round(server_s / took - idle, 4),
        "autoscaler_core_without": round(idle, 4),
        "browser_core": round(browser_s / took, 4),
        "first_paint_ms": round(paint_ms, 1),
        "overview_bytes": size,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure each size, print the table, write JSON."""
    parser = bench_parser("page", __doc__)
    parser.add_argument("--instances", default="1,100,1000", help="sizes of the fleet (default 1,100,1000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="to watch each (default 20)")
    parser.add_argument("--serve", type=int, metavar="N", help="serve the page of N instances, by itself")
    args = parser.parse_args(argv)
    if args.serve is not None:
        serve(args.serve)
        return
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        raise ConfigError("no browser here: `make bench-page` installs it")
    playwright = importlib.import_module("playwright.sync_api")
    found = [measure(int(n), args.seconds, playwright, chromium) for n in args.instances.split(",")]
    print(f"{'instances':>9} {'autoscaler':>11} {'browser':>8} {'first paint':>12} {'/overview':>10}")
    for one in found:
        print(
            f"{one['instances']:>9} {one['autoscaler_core']:>10.1%} {one['browser_core']:>8.1%} "
            f"{one['first_paint_ms']:>9.0f} ms {one['overview_bytes'] / 1e3:>7.0f} kB"
        )
    print(f"targets: {TARGET_CORE:.0%} of a core at 100 instances, first paint in {TARGET_PAINT_MS:g} ms")
    write_json(args.json, {"machine": machine(), "sizes": found})


if __name__ == "__main__":
    run_main(main)
