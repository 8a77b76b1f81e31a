"""`python sim.py --virtual`: play a trace against a whole fleet in virtual time and report as for a live run.

    python sim.py --virtual --trace FILE            a log, in any of the formats of simulation/traces/logs.py
    python sim.py --virtual --trace synthetic:…     for those who have none (simulation/traces/synthetic.py)

The same flags and seed give the same report, byte for byte: nothing in it depends on machine or clock.
"""

import functools
import itertools
import logging
import random
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.profiles import PROFILES, get_profile, use_own_profiles
from engine.slo import Slo
from fleet.limits import Limits
from fleet_client.flags import Parser, add_flags, check_flags, flag, within
from localcloud.machines import Machine
from localcloud.offers_file import read_machines
from policies import POLICIES, Policy, make_policy, parse_params
from process.errors import ConfigError
from process.own_profiles import read_own_profiles
from process.progress import Progress
from simulation import plots, report, report_table
from simulation.report_file import check_output, write_page, write_report
from simulation.traces import logs, synthetic
from simulation.traces.reading import read
from simulation.traces.request import ReadNotes, Request
from simulation.traces.time_units import AUTO, UNITS
from simulation.virtual.beginning import Beginning, begin
from simulation.virtual.cloud import Hazards, deep_market, parse_hazards
from simulation.virtual.outcome import Outcome
from simulation.virtual.setting import Setting
from simulation.virtual.timings_file import read_timings
from simulation.virtual.virtual_fleet import simulate


@dataclass(frozen=True)
class VirtualConfig:
    """The flags of `sim.py --virtual`. Times are seconds of virtual time."""

    trace: str = flag(
        "", "a log of requests, or synthetic[:NAME=NUMBER,…]; needed", metavar="FILE", shown="none"
    )
    time_unit: str = flag(
        AUTO, "of times in the log that are numbers and do not say it", choices=(AUTO, *UNITS)
    )
    rate_scale: float = flag(
        1.0,
        "arrivals are repeated, or thinned, to so many times as many",
        least=0.001,
        most=10_000.0,
        metavar="K",
        unit="factor",
    )
    jitter_s: float = flag(5.0, "seconds by which a repeat is moved at most", least=0.0, most=3600.0)
    tick_s: float = flag(
        0.0, "seconds to which the log's times are rounded: spread them; 0 for no", least=0.0, most=3600.0
    )
    days: float | None = flag(
        None,
        "tile the log under a daily profile for so long",
        least=0.01,
        most=366.0,
        metavar="N",
        unit="days",
        shown="as it is",
    )
    policy: str = flag(
        "objective", f"what says how many instances are hot, one of {', '.join(POLICIES)}", metavar="NAME"
    )
    policy_param: tuple[str, ...] = flag(
        (),
        "a parameter of the policy; may be repeated",
        metavar="NAME=NUMBER",
        shown="the policy's own",
    )
    goal: float | None = flag(
        None,
        "share of requests that shall be in time: the parameter of policy objective",
        metavar="SHARE",
        shown="0.99",
    )
    profiles: Path | None = flag(
        None,
        "file of your own model profiles, TOML (docs/models.md)",
        shown="profiles.toml here",
    )
    profile: str = flag("vllm-13", f"model and its times, one of {', '.join(PROFILES)}", metavar="NAME")
    gpu: str | None = flag(
        None, "take only machines of the market with that GPU", metavar="NAME", shown="all"
    )
    offers: Path | None = flag(
        None, "machines for rent, JSON as for localcloud", shown="localcloud's, and more of each kind"
    )
    timings: Path | None = flag(
        None,
        "step-time constants of your own (simulation/virtual/timings_file.py)",
        shown="the built-in ones",
    )
    hazards: Hazards = flag(
        Hazards(),
        f"what goes wrong, of {', '.join(Hazards.__dataclass_fields__)}",
        metavar="NAME=NUMBER,…",
        shown="nothing",
        read=parse_hazards,
    )
    pool: int | None = flag(
        None, "loaded instances when the trace begins", unit="instances", shown="as its first 15 min need"
    )
    hot: int | None = flag(
        None, "how many of them are hot", unit="instances", shown="as its first 15 min need"
    )
    max_instances: int = flag(200, "hard limit on instances", least=1, most=100_000, unit="instances")
    max_usd_h: float = flag(
        1000.0, "hard limit on what all cost together", least=0.01, most=1e6, metavar="USD", unit="$/h"
    )
    late_lane: bool = flag(True, "requests that cannot be in time any more let the others pass")
    late_bound_s: float = flag(
        300.0, "seconds after which a late request goes before all others", least=0.0, most=86_400.0
    )
    request_timeout_s: float = flag(
        600.0, "seconds for a request, all tries together", least=0.1, most=86_400.0
    )
    lead_in_s: float | None = flag(
        None,
        "seconds of the trace's beginning that are played once before it, uncounted",
        least=0.0,
        most=1e6,
        shown="900; 0 with --hot",
    )
    score_from_s: float | None = flag(
        None,
        "seconds from the first arrival before which nothing counts",
        least=0.0,
        most=1e9,
        shown="the longest start",
    )
    score_to_s: float = flag(
        float("inf"), "seconds from the first arrival after which nothing counts", shown="the end"
    )
    replay_every_s: float = flag(
        1800.0, "seconds between two tunings by replay; 0 for none", least=0.0, most=1e9
    )
    seed: int = flag(
        0, "number from which everything is drawn", least=0, most=2**63 - 1, shown="random, and printed"
    )
    json: Path | None = flag(None, "write the report to this file, as JSON")
    html: Path | None = flag(None, "write the report to this file, as a page that needs nothing else")
    plot: Path | None = flag(None, "draw the fleet over time into this file, as PNG")
    quiet: bool = flag(False, "print no progress, only the report")

    def checked(self) -> "VirtualConfig":
        """Return the configuration unchanged; raise a ConfigError with the flag, the value and the range."""
        if not self.trace:
            raise ConfigError("--virtual needs --trace FILE, or --trace synthetic for one that is made up")
        check_flags(self)
        within("--pool", self.pool or 0, 0, self.max_instances)
        within("--hot", self.hot or 0, 0, self.max_instances)
        get_profile(self.profile)
        check_output("--json", self.json)
        check_output("--html", self.html)
        check_output("--plot", self.plot)
        return self

    def make_policy(self) -> Policy:
        """Return the policy that the flags name, with its parameters; raise ConfigError."""
        goal = () if self.goal is None else (f"goal={self.goal:g}",)
        return make_policy(POLICIES, self.policy, parse_params("--policy-param", self.policy_param + goal))


def requests_of(config: VirtualConfig, notes: ReadNotes | None = None) -> Iterator[Request]:
    """Yield the arrivals of the trace, tiled, repeated or thinned as the flags say.

    Raises ConfigError, also while the trace is read. notes: how the log was read.
    """
    rng = random.Random(config.seed)
    seeds = [rng.getrandbits(64) for _ in range(4)]
    name, _, options = config.trace.partition(":")
    if name == "synthetic":
        spec = synthetic.parse(options)
        if config.days is not None:
            spec = replace(spec, days=config.days)
        found = synthetic.requests(spec, seeds[0])
    elif config.days is not None:
        profile = logs.HOUR_FACTORS["servegen_m-small"]
        again = functools.partial(_log, config, seeds[3], notes)
        found = logs.tiled(again, config.days, profile, random.Random(seeds[1]))
    else:
        found = _log(config, seeds[3], notes)
    if config.rate_scale != 1.0:
        found = logs.scaled(found, config.rate_scale, config.jitter_s, random.Random(seeds[2]))
    return found


def _log(config: VirtualConfig, seed: int, notes: ReadNotes | None) -> Iterator[Request]:
    found = read(Path(config.trace), notes, config.time_unit)
    return found if not config.tick_s else logs.spread_ticks(found, config.tick_s, random.Random(seed))


def setting_of(config: VirtualConfig) -> Setting:
    """Return what the run depends on beside trace, policy and beginning; raise ConfigError."""
    return Setting(
        profile=get_profile(config.profile),
        machines=_market(config),
        limits=Limits(config.max_instances, config.max_usd_h, max_creates_per_turn=8),
        slo=Slo(),
        hazards=config.hazards,
        timings={} if config.timings is None else read_timings(config.timings),
        late_bound_s=config.late_bound_s if config.late_lane else None,
        timeout_s=config.request_timeout_s,
        seed=config.seed,
        score_to_s=config.score_to_s,
        replay_every_s=config.replay_every_s,
    )


def _market(config: VirtualConfig) -> tuple[Machine, ...]:
    machines = deep_market() if config.offers is None else read_machines(config.offers)
    if config.gpu is not None:
        machines = tuple(m for m in machines if m.gpu_name == config.gpu)
        if not machines:
            raise ConfigError(f"--gpu {config.gpu!r}: no machine of the market has it")
    return machines


def report_of(
    config: VirtualConfig, outcome: Outcome, policy: Policy, beginning: Beginning
) -> dict[str, Any]:
    """Return a run's report, with what only virtual time knows: policy, beginning, curve, audit and so on."""
    o = outcome
    requests = report.Counted(
        sent=o.requests,
        completed=o.completed,
        retried=o.retried,
        failed_by_kind=o.failed,
        setbacks_by_kind=o.setbacks,
        refusals_by_kind=o.refusals,
        prompt_tokens=o.prompt_tokens,
        output_tokens=o.output_tokens,
        latency_s={
            "route": o.route.spread(),
            "ttft": o.first_token.spread(),
            "tpot": o.per_token.spread(),
            "itl": o.between_tokens,
            "e2e": o.whole.spread(),
        },
        missed_by=dict(sorted(o.missed_why.items())),
        late_wait_s=o.late_wait.spread(),
        late_lane=o.late if config.late_lane else None,
    )
    settings = {
        "trace": Path(config.trace).name if not config.trace.startswith("synthetic") else config.trace,
        "rate_scale": config.rate_scale,
        "days": config.days,
        "policy": config.policy,
        "late_lane": config.late_lane,
        "gpu": config.gpu,
        "pool": beginning.pool,
        "hot": beginning.hot,
        "score_from_s": beginning.score_from_s,
        "hazards": None if config.hazards == Hazards() else asdict(config.hazards),
        "prompts_cut": o.cut or None,
    }
    run = report.RunInfo(
        engine="virtual time, simulated machines",
        local=False,
        model=config.profile,
        seed=config.seed,
        streaming=True,
        started_at=0.0,
        duration_s=o.duration_s,
        interrupted=False,
        settings=settings,
        cpu_share=0.0,
        ends_untold=0,
    )
    found = report.assemble(run, requests, o.over_time, _costs(o), None, Slo(), None)
    found["policy"] = {"name": config.policy, "began_as": _fields(policy), "ended_as": _fields(o.policy)}
    found["beginning"] = beginning.report()
    found["clamped"] = dict(o.clamped)
    found["curve"] = o.curve
    found["audit"] = o.audit
    return found


def _fields(policy: Policy) -> dict[str, Any]:
    fields = getattr(policy, "__dataclass_fields__", {})
    return {name: getattr(policy, name) for name in fields}


def _costs(o: Outcome) -> report.RunCosts:
    kinds = [kind for kind, _, _ in o.took]
    return report.RunCosts(
        usd=report.SpentUsd(**{name: getattr(o.costs, name) for name in report.SpentUsd.__struct_fields__}),
        usd_if_all_hot=o.costs.usd_if_all_hot,
        utilisation=o.costs.utilisation,
        starts=kinds.count("start"),
        stops=kinds.count("stop"),
        creates=kinds.count("create"),
        destroys=kinds.count("destroyed"),
        order_to_hot_s=tuple(s for kind, _, s in o.took if kind in ("boot", "load")),
    )


def table(found: dict[str, Any]) -> str:
    """Return the report of a run in virtual time as text for people."""
    lines = [report_table.table(found)]
    for n, sentence in enumerate(found["beginning"]["sentences"]):
        lines.append(f"{'' if n else 'began with':14}{sentence}")
    for what, turns in found["clamped"].items():
        lines.append(f"{'hard limits':14}in {turns:,} turns the policy wanted a number of {what} beyond them")
    curve = found["curve"]
    if curve:
        points = "   ".join(f"{p['met']:.1%} ${p['usd_day']:,.2f}" for p in curve["curve"])
        lines.append(f"{'yesterday':14}would have cost a day, by the share in time: {points}")
    audit = found["audit"]
    lines.append(
        f"{'audit':14}{audit['requests']:,} requests ended once each; the ledger has "
        f"${audit['usd_in_ledger']:,.4f}, the cloud charged ${audit['usd_charged']:,.4f}"
    )
    return "\n".join(lines)


# --- outside world ---------------------------------------------------------------------------------


def parser() -> Parser:
    """Return the parser of the flags of a run in virtual time."""
    found = Parser(
        prog="sim.py --virtual", environment="SIM_VIRTUAL_", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument(
        "--virtual", action="store_true", help="this: in virtual time, with simulated machines"
    )
    add_flags(found, VirtualConfig)
    return found


def parse(argv: Sequence[str]) -> VirtualConfig:
    """Return the command line as a VirtualConfig; raise ConfigError."""
    given = vars(parser().parse_args(argv))
    del given["virtual"]
    given.setdefault("seed", secrets.randbelow(2**32))
    use_own_profiles(*read_own_profiles(given.get("profiles")))
    return VirtualConfig(**given).checked()


def carry_out(config: VirtualConfig) -> dict[str, Any]:
    """Carry out the run in virtual time and return its report."""
    policy = config.make_policy()
    notes = ReadNotes()
    requests = requests_of(config, notes)
    first = next(requests, None)
    if first is None:
        raise ConfigError(f"{config.trace}: no requests are left at --rate-scale {config.rate_scale:g}")
    setting, beginning, requests = begin(
        setting_of(config),
        policy,
        itertools.chain((first,), requests),
        hot=config.hot,
        pool=config.pool,
        lead_in_s=config.lead_in_s,
        score_from_s=config.score_from_s,
    )
    if not config.quiet:
        requests = _shown(requests, config, notes, beginning)
    outcome = simulate(setting, policy, requests)
    found = report_of(config, outcome, policy, beginning)
    found["settings"]["trace_read_as"] = "; ".join(notes.lines) or None
    if config.plot is not None:
        plots.fleet(found, config.plot)
    return found


def _shown(
    requests: Iterator[Request], config: VirtualConfig, notes: ReadNotes, beginning: Beginning
) -> Iterator[Request]:
    """Yield the same requests, and tell how far the run is."""
    progress = Progress()
    lead_in_s = beginning.lead_in_s
    for n, request in enumerate(requests):
        yield request
        if n % 256 == 0:
            at_s = max(0.0, request.at_s)
            # What was looked at is read already.
            length_s = _length_s(config, notes, max(at_s, beginning.looked_s))
            share = None if length_s is None else (request.at_s + lead_in_s) / (length_s + lead_in_s)
            progress.to(share, f"{at_s / 3600:.1f} h of the trace, {n + 1:,} requests")


def _length_s(config: VirtualConfig, notes: ReadNotes, read_s: float) -> float | None:
    """Return the length of the trace, of which read_s seconds are read: as asked for, or by its file."""
    if config.days is not None:
        return 86_400.0 * config.days
    if config.trace.startswith("synthetic"):
        return 86_400.0 * synthetic.parse(config.trace.partition(":")[2]).days
    share = notes.read_share
    return read_s / share if share else None


def main(argv: Sequence[str]) -> int:
    """Run in virtual time as the flags say; return exit status 0, or 1 when requests failed.

    Raises ConfigError.
    """
    config = parse(argv)
    logging.getLogger("autoscaler").setLevel(logging.ERROR)  # refusals and retries are in the report
    if not config.quiet:
        print(f"seed {config.seed}", file=sys.stderr)
    found = carry_out(config)
    print(table(found))
    write_report(found, config.json)
    write_page(found, config.html)
    return 0 if not found["requests"]["failed"] else 1
