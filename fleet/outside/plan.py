"""The command `plan`: what `prepare` would rent and what it would cost. Nothing is ordered.

With a trace, or with the fleet's last day, it also says what that would have cost on the machines that the
limits allow: a run in virtual time on a market of exactly these.
"""

import argparse
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.gpus import gpu_of
from engine.profile import Profile
from engine.profiles import get_profile
from engine.slo import Slo
from fleet.candidates import Candidate, candidates, choose, summary
from fleet.fits import fits_of
from fleet.gpu_numbers import numbers_of
from fleet.limits import Limits
from fleet.market import sorted_out
from fleet.outside.beforehand import beforehand_of
from fleet.outside.config import SERVE_ONLY, AutoscalerConfig, vast_settings
from fleet.outside.fits_table import show_fits
from fleet.outside.ledger import Ledger
from fleet.outside.operator_commands import wide_console
from fleet.outside.replay_process import ReplayFailed, ReplayProcess
from fleet.replay import WINDOW_S, BadReply
from fleet.what_if import LEAST_REQUESTS, FleetNow, flags_of, log_of, summary_of
from fleet_client import private_files
from fleet_client.flags import Parser, add_flags, within
from process.errors import CloudError, ConfigError
from process.safe_text import safe_text
from vast.cli import Cli
from vast.client import Vast
from vast.rows import Offer

SHOWN = 15
"""Lines of the table; those from which something would be taken come first."""

MOST_PLAYED_S = 3600.0
"""Seconds after which a run in virtual time is given up: a day of a million requests takes two minutes."""


@dataclass(frozen=True)
class PlanConfig:
    """What is asked of `plan`. trace: a log of requests to play; yesterday: play the fleet's own last day.

    fits: show which GPUs of the market serve the model in time.
    """

    count: int = 1
    as_json: bool = False
    trace: str = ""
    yesterday: bool = False
    fits: bool = False


def add_plan(commands: "argparse._SubParsersAction[Parser]", environment: str) -> None:
    """Add the command's parser. environment: beginning of its flags' names there."""
    plan_it = commands.add_parser(
        "plan",
        environment=environment,
        description="Show what `prepare --count N` would rent and what it would cost. Nothing is ordered.",
        epilog="--count, --json, --trace, --yesterday and --fits are for the command line only.",
        help="what prepare would cost, without renting",
    )
    add_flags(plan_it, AutoscalerConfig, without=SERVE_ONLY - {"policy", "policy_param", "goal"})
    plan_it.add_argument(
        "--count", type=int, default=1, metavar="N", help="how many instances to plan for (default 1)"
    )
    plan_it.add_argument("--json", action="store_true", help="print the answer as JSON (default: a table)")
    plan_it.add_argument(
        "--trace",
        default="",
        metavar="FILE",
        help="a log of requests: what would it have cost on these machines? (default: none is played)",
    )
    plan_it.add_argument(
        "--yesterday", action="store_true", help="the same for the fleet's own last day (default: not played)"
    )
    plan_it.add_argument(
        "--fits",
        action="store_true",
        help="which GPUs of the market serve the model in time, and what a million tokens cost there "
        "(default: not shown)",
    )


def plan(
    config: AutoscalerConfig,
    asked: PlanConfig,
    virtual: Sequence[str],
    console: Console | None = None,
) -> None:
    """Show what `prepare --count N` would rent and cost; raise ConfigError where it cannot be known.

    virtual: the command of a run in virtual time.
    """
    within("--count", asked.count, 1, 1000)
    if asked.trace and asked.yesterday:
        raise ConfigError("--trace and --yesterday: wanted one of them")
    profile, preferences = get_profile(config.model), config.preferences
    state_dir = config.state_dir or private_files.default_state_dir(config.label)
    private_files.make_private_dir(state_dir)
    cli = Cli(vast_settings(config, state_dir, os.environ, Path.home()))
    vast = Vast(cli)
    query = config.offer_query(profile)
    try:
        offers = vast.search_offers(query, storage_gb=profile.disk_gb)
    except CloudError as e:
        raise ConfigError(f"the cloud cannot be searched: {e}") from e
    ledger = _ledger(state_dir)
    bad = _bad_machines(ledger)
    wanted, refused = sorted_out((o for o in offers if o.machine_id not in bad), profile, preferences)
    found = candidates(wanted, profile)
    taken = choose(found, asked.count, preferences)
    limits = Limits(config.max_instances, config.max_dollars_per_hour)
    said = summary(taken, asked.count, limits, preferences)
    if failed := sum(o.machine_id in bad for o in offers):
        said.append(f"{failed} offers left out: their machines failed lately, or are banned.")
    fits = fits_of(wanted, profile, Slo()) if asked.fits else None
    said += [f"{f.says[:1].upper()}{f.says[1:]}." for f in beforehand_of(config, profile, cli).findings()]
    if refused:
        said.append(f"Left out: {', '.join(f'{n} {why}' for why, n in refused.most_common())}.")
    market = choose(found, config.max_instances, preferences)
    played = _played(config, asked, profile, market, ledger, virtual)
    console = console or wide_console()
    if asked.as_json:
        answer = {
            "taken": [c.shown() for c in taken],
            "offers": [c.shown() for c in found],
            "says": said,
            "played": played,
            "fits": None if fits is None else [f.shown() for f in fits],
        }
        console.print(json.dumps(answer), highlight=False, markup=False, soft_wrap=True)
        return
    console.print(_table(found, taken))
    if fits is not None:
        show_fits(fits, profile, console)
    if played is not None:
        said.append(_in_words(played))
    for sentence in said:
        console.print(sentence, highlight=False, markup=False)


def _ledger(state_dir: Path) -> Ledger | None:
    path = state_dir / "ledger.sqlite"
    try:
        return Ledger(path) if path.exists() else None
    except (sqlite3.Error, OSError):
        return None


def _bad_machines(ledger: Ledger | None) -> frozenset[int]:
    """Return the machines that the fleet does not rent now, because they failed or are banned."""
    now = time.time()
    if ledger is None:
        return frozenset()
    return frozenset(m for m, until in ledger.saved_fleet(now).bad_machines.items() if until > now)


# -- what a day would have cost ----------------------------------------------------------------------------


def _played(
    config: AutoscalerConfig,
    asked: PlanConfig,
    profile: Profile,
    market: Sequence[Candidate],
    ledger: Ledger | None,
    virtual: Sequence[str],
) -> dict[str, Any] | None:
    """Return the figures of a run in virtual time on a market of these machines; None if none is asked for.

    Raises ConfigError where it cannot be made.
    """
    if not asked.trace and not asked.yesterday:
        return None
    machines = machines_of(market)
    if not machines:
        raise ConfigError("no offer says how fast its GPUs are, by name or by numbers: nothing can be played")
    fleet = FleetNow(
        profile.name, config.make_policy(), config.max_instances, config.max_dollars_per_hour, late_lane=True
    )
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        offers, report = Path(folder) / "offers.json", Path(folder) / "report.json"
        offers.write_text(json.dumps(machines))
        trace = asked.trace
        if asked.yesterday:
            (Path(folder) / "day.csv").write_text("".join(_yesterday(ledger, profile)))
            trace = str(Path(folder) / "day.csv")
        elif not trace.startswith("synthetic"):
            trace = str(Path(trace).resolve())
        files = [f"--trace={trace}", f"--offers={offers}", f"--json={report}", "--quiet"]
        try:
            ReplayProcess(virtual, MOST_PLAYED_S).run(b"", [*files, *flags_of(fleet, None)])
            return summary_of(report.read_bytes()) | {"machines": len(machines), "of": len(market)}
        except ReplayFailed as e:
            raise ConfigError(f"the trace cannot be played: {safe_text(e.said)}") from e
        except (BadReply, OSError, ValueError) as e:
            raise ConfigError(f"the trace cannot be played: {safe_text(str(e))}") from e


def _yesterday(ledger: Ledger | None, profile: Profile) -> list[str]:
    now = time.time()
    arrived = [] if ledger is None else ledger.arrived(now - WINDOW_S, now)
    requests = sum(a.requests for a in arrived)
    if requests < LEAST_REQUESTS:
        raise ConfigError(
            f"--yesterday: {requests:.0f} requests are known of the last day, {LEAST_REQUESTS} needed"
        )
    return list(log_of(arrived, profile.prefill_weight))


def machines_of(market: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return offers as machines of a local cloud, one slot each; those of unknown speed are left out.

    Unknown is the speed of a GPU whose name says nothing, and whose offer says nothing of it either.
    """
    return [
        {
            "machine_id": number,
            "gpu_name": o.gpu_name,
            "usd_gpu_h": max(0.001, o.dph_base / o.num_gpus),
            "num_gpus": o.num_gpus,
            "slots": 1,
            "host_id": o.host_id or number,
            "storage_usd_gb_month": o.storage_cost_gb_month,
            "inet_down": max(0.1, o.inet_down_mbps),
            "inet_usd_gb": o.inet_down_usd_gb or 0.0,
            "reliability": min(1.0, o.reliability),
            **_gpu_numbers(o),
        }
        for number, o in enumerate((c.offer for c in market), start=1)
        if gpu_of(o.gpu_name, numbers_of(o)) is not None
    ]


def _gpu_numbers(offer: Offer) -> dict[str, Any]:
    told = numbers_of(offer)
    return {"gpu_ram_mb": round(offer.gpu_ram_mb), "gpu_tflops": told.fp32_tflops, "gpu_mem_bw": told.gb_s}


def _in_words(played: dict[str, Any]) -> str:
    first = played["ttft_s"]
    return (
        f"Played in virtual time with up to {played['machines']} of these machines: {played['requests']} "
        f"requests in {played['hours']:.1f} h would have cost ${played['usd_day']:.2f} a day, "
        f"{played['met']:.1%} in time, first token after {first['p50']:.2f} s (p50) and "
        f"{first['p99']:.2f} s (p99), at most {played['most_hot']} hot."
    )


_COLUMNS = (
    "take",
    "of",
    "GPU",
    "place",
    "host",
    "reliable",
    "driver",
    "Mbit/s",
    "$/GB in",
    "$/h",
    "stopped",
    "$/M tokens",
    "min to hot",
    "$ to set up",
    "days left",
)


def _table(found: Sequence[Candidate], taken: Sequence[Candidate]) -> Table:
    """Return the offers as a table; those of one machine that are alike are one line."""
    table = Table(box=None)
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True)
    alike: dict[tuple[str, ...], list[Candidate]] = {}
    for c in found:
        alike.setdefault((str(c.offer.machine_id), *_cells(c)), []).append(c)
    lines = sorted(alike.items(), key=lambda line: not any(c in taken for c in line[1]))
    for number, ((_, *cells), of) in enumerate(lines):
        take = sum(c in taken for c in of)
        if number >= SHOWN and not take:
            break
        table.add_row(str(take or ""), str(len(of)), *(safe_text(cell) for cell in cells))
    return table


def _cells(c: Candidate) -> tuple[str, ...]:
    o = c.offer
    return (
        f"{o.num_gpus} x {o.gpu_name}",
        o.geolocation or "?",
        "?" if o.host_id is None else str(o.host_id),
        f"{o.reliability:.1%}",
        o.driver_version or "?",
        f"{o.inet_down_mbps:.0f}",
        "?" if o.inet_down_usd_gb is None else f"{o.inet_down_usd_gb:.4f}",
        f"{c.usd_h:.3f}",
        f"{c.stopped_usd_h:.4f}",
        f"{c.usd_per_million_work:.3f}",
        f"{c.hot_s / 60.0:.0f}",
        "?" if c.usd_to_set_up is None else f"{c.usd_to_set_up:.3f}",
        "?" if o.duration_s is None else f"{o.duration_s / 86_400.0:.0f}",
    )
