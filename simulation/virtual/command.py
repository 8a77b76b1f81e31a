"""`python sim.py --virtual`: play a trace against a whole fleet in virtual time and report as for a live run.

    python sim.py --virtual --trace FILE            a log, in any of the formats of simulation/traces/logs.py
    python sim.py --virtual --trace synthetic:…     for those who have none (simulation/traces/synthetic.py)

The same flags and seed give the same report, byte for byte: nothing in it depends on machine or clock.
"""

import argparse
import itertools
import json
import logging
import random
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.profiles import PROFILES, get_profile
from engine.slo import Slo
from fleet.limits import Limits
from fleet_client.flags import Parser, within
from localcloud.machines import Machine, machines_from
from policies import POLICIES, Policy, make_policy, parse_params
from process.errors import ConfigError
from simulation import plots, report
from simulation.traces import logs, synthetic
from simulation.traces.logs import Request
from simulation.virtual.cloud import Hazards, deep_market, parse_hazards
from simulation.virtual.outcome import Outcome
from simulation.virtual.setting import Setting
from simulation.virtual.timings_file import read_timings
from simulation.virtual.virtual_fleet import simulate

SHOW_S = 5.0
"""Between two lines of progress, in real seconds."""


@dataclass(frozen=True)
class VirtualConfig:
    """Everything a user may set. Times in seconds of virtual time."""

    trace: str = ""
    rate_scale: float = 1.0
    jitter_s: float = 5.0
    tick_s: float = 0.0
    days: float | None = None
    policy: str = "objective"
    policy_params: tuple[str, ...] = ()
    profile: str = "vllm-13"
    gpu: str | None = None
    offers: Path | None = None
    timings: Path | None = None
    hazards: Hazards = field(default_factory=Hazards)
    pool: int = 4
    hot: int = 1
    max_instances: int = 200
    max_usd_h: float = 1000.0
    late_lane: bool = True
    late_bound_s: float = 300.0
    request_timeout_s: float = 600.0
    score_from_s: float = 0.0
    score_to_s: float = float("inf")
    replay_every_s: float = 1800.0
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None
    quiet: bool = False

    def checked(self) -> "VirtualConfig":
        """Itself, or ConfigError naming the flag, the value and the range."""
        if not self.trace:
            raise ConfigError("--virtual needs --trace FILE, or --trace synthetic for one that is made up")
        within("--rate-scale", self.rate_scale, 0.001, 10_000.0)
        within("--jitter-s", self.jitter_s, 0.0, 3600.0)
        within("--tick-s", self.tick_s, 0.0, 3600.0)
        if self.days is not None:
            within("--days", self.days, 0.01, 366.0)
        within("--pool", self.pool, 0, self.max_instances)
        within("--hot", self.hot, 0, self.max_instances)
        within("--max-instances", self.max_instances, 1, 100_000)
        within("--max-usd-h", self.max_usd_h, 0.01, 1e6)
        within("--late-bound-s", self.late_bound_s, 0.0, 86_400.0)
        within("--request-timeout-s", self.request_timeout_s, 0.1, 86_400.0)
        within("--score-from-s", self.score_from_s, 0.0, 1e9)
        within("--replay-every-s", self.replay_every_s, 0.0, 1e9)
        within("--seed", self.seed, 0, 2**63 - 1)
        get_profile(self.profile)
        for flag, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                if not path.absolute().parent.is_dir():
                    raise ConfigError(f"{flag} {path}: there is no directory {path.absolute().parent}")
                if path.is_dir():
                    raise ConfigError(f"{flag} {path}: wanted a file, that is a directory")
        return self


def requests_of(config: VirtualConfig) -> Iterator[Request]:
    """The arrivals: read or made up, tiled, repeated or thinned. Raises ConfigError, also while read."""
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
        found = logs.tiled(lambda: _log(config, seeds[3]), config.days, profile, random.Random(seeds[1]))
    else:
        found = _log(config, seeds[3])
    if config.rate_scale != 1.0:
        found = logs.scaled(found, config.rate_scale, config.jitter_s, random.Random(seeds[2]))
    return found


def _log(config: VirtualConfig, seed: int) -> Iterator[Request]:
    found = logs.read(Path(config.trace))
    return found if not config.tick_s else logs.spread_ticks(found, config.tick_s, random.Random(seed))


def setting_of(config: VirtualConfig) -> Setting:
    """What the run depends on beside trace and policy; raises ConfigError."""
    return Setting(
        profile=get_profile(config.profile),
        machines=_market(config),
        limits=Limits(config.max_instances, config.max_usd_h, max_creates_per_turn=8),
        slo=Slo(),
        hazards=config.hazards,
        timings={} if config.timings is None else read_timings(config.timings),
        late_bound_s=config.late_bound_s if config.late_lane else None,
        timeout_s=config.request_timeout_s,
        pool=config.pool,
        hot=config.hot,
        seed=config.seed,
        score_from_s=config.score_from_s,
        score_to_s=config.score_to_s,
        replay_every_s=config.replay_every_s,
    )


def _market(config: VirtualConfig) -> tuple[Machine, ...]:
    if config.offers is not None:
        try:
            machines = machines_from(json.loads(config.offers.read_text()))
        except (OSError, ValueError) as e:
            raise ConfigError(f"--offers {config.offers}: {e}") from None
    else:
        machines = deep_market()
    if config.gpu is not None:
        machines = tuple(m for m in machines if m.gpu_name == config.gpu)
        if not machines:
            raise ConfigError(f"--gpu {config.gpu!r}: no machine of the market has it")
    return machines


def report_of(config: VirtualConfig, outcome: Outcome, policy: Policy) -> dict[str, Any]:
    """The report, with what only virtual time can tell: the policy, its clamps and curve, and the audit."""
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
        "pool": config.pool,
        "hazards": None if config.hazards == Hazards() else asdict(config.hazards),
        "prompts_cut": o.cut or None,
    }
    run = report.Run(
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
    found = report.assemble(run, requests, o.samples, _costs(o), None, Slo(), None)
    found["policy"] = {"name": config.policy, "began_as": _fields(policy), "ended_as": _fields(o.policy)}
    found["clamped"] = dict(o.clamped)
    found["curve"] = o.curve
    found["audit"] = o.audit
    return found


def _fields(policy: Policy) -> dict[str, Any]:
    fields = getattr(policy, "__dataclass_fields__", {})
    return {name: getattr(policy, name) for name in fields}


def _costs(o: Outcome) -> report.Costs:
    kinds = [kind for kind, _, _ in o.took]
    return report.Costs(
        usd={
            "total": o.costs.total,
            "hot_working": o.costs.hot_working,
            "hot_idle": o.costs.hot_idle,
            "loading": o.costs.loading,
            "stopped": o.costs.stopped,
            "lost": o.costs.lost,
        },
        usd_if_all_hot=o.costs.usd_if_all_hot,
        utilisation=o.costs.utilisation,
        starts=kinds.count("start"),
        stops=kinds.count("stop"),
        creates=kinds.count("create"),
        destroys=kinds.count("destroyed"),
        order_to_hot_s=tuple(s for kind, _, s in o.took if kind in ("boot", "load")),
    )


def table(found: dict[str, Any]) -> str:
    """The report as text."""
    lines = [report.table(found)]
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


def _parser() -> argparse.ArgumentParser:
    d = VirtualConfig()
    parser = Parser(prog="sim.py --virtual", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--virtual", action="store_true", help="this: in virtual time, with simulated machines"
    )

    def add(flag: str, kind: Any, metavar: str, default: object, text: str) -> None:
        shown = f"{default:g}" if isinstance(default, int | float) else f"{default}"
        parser.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default {shown})")

    add("--trace", str, "FILE", "none", "a log of requests, or synthetic[:NAME=NUMBER,…]")
    add("--rate-scale", float, "K", d.rate_scale, "arrivals are repeated, or thinned, to K times as many")
    add("--jitter-s", float, "S", d.jitter_s, "each repeat is moved by up to so much")
    add("--tick-s", float, "S", d.tick_s, "times of the log are rounded to so much: spread them; 0 for no")
    add("--days", float, "N", "as it is", "the log is tiled under a daily profile for so long")
    add("--policy", str, "NAME", d.policy, ", ".join(POLICIES))
    parser.add_argument(
        "--policy-param", action="append", default=[], metavar="NAME=NUMBER",
        help="a parameter of the policy; may be repeated (default: the policy's own)",
    )  # fmt: skip
    add("--goal", float, "SHARE", "0.99", "of requests in time: the parameter of policy objective")
    add("--profile", str, "NAME", d.profile, ", ".join(PROFILES))
    add("--gpu", str, "NAME", "all", "only machines of the market with that GPU")
    add("--offers", Path, "FILE", "localcloud's, deeper", "machines for rent, JSON as for localcloud")
    add("--timings", Path, "FILE", "none", "constants of model servers of your own (engine/reference.py)")
    add(
        "--hazards",
        str,
        "NAME=NUMBER,…",
        "none",
        "what goes wrong: " + ", ".join(Hazards.__dataclass_fields__),
    )
    add("--pool", int, "N", d.pool, "loaded instances when the trace begins")
    add("--hot", int, "N", d.hot, "of them hot")
    add("--max-instances", int, "N", d.max_instances, "hard limit")
    add("--max-usd-h", float, "USD", d.max_usd_h, "hard limit")
    parser.add_argument(
        "--late-lane", action=argparse.BooleanOptionalAction, default=None,
        help="who cannot be in time any more lets the others pass (default --late-lane)",
    )  # fmt: skip
    add("--late-bound-s", float, "S", d.late_bound_s, "but waits no longer than so")
    add("--request-timeout-s", float, "S", d.request_timeout_s, "for a request, all tries together")
    add("--score-from-s", float, "S", d.score_from_s, "what arrives and is spent before does not count")
    add("--score-to-s", float, "S", "the end", "nor what comes after")
    add("--replay-every-s", float, "S", d.replay_every_s, "between two tunings by replay; 0 for none")
    add("--seed", int, "N", "random, and printed", "everything is drawn from")
    add("--json", Path, "FILE", "none", "write the report there")
    add("--plot", Path, "FILE", "none", "draw the fleet over time there, PNG")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the report")
    return parser


def parse(argv: Sequence[str]) -> VirtualConfig:
    """The flags as a VirtualConfig; raises ConfigError."""
    given = {k: v for k, v in vars(_parser().parse_args(argv)).items() if v is not None and k != "virtual"}
    params = [*given.pop("policy_param")]
    if "goal" in given:
        params.append(f"goal={given.pop('goal'):g}")
    if "hazards" in given:
        given["hazards"] = parse_hazards(given["hazards"])
    given.setdefault("seed", secrets.randbelow(2**32))
    return VirtualConfig(**given, policy_params=tuple(params)).checked()


def carry_out(config: VirtualConfig) -> dict[str, Any]:
    """The report of the run."""
    policy = make_policy(POLICIES, config.policy, parse_params("--policy-param", config.policy_params))
    requests = requests_of(config)
    if not config.quiet:
        requests = _shown(requests)
    first = next(requests, None)
    if first is None:
        raise ConfigError(f"{config.trace}: no requests are left at --rate-scale {config.rate_scale:g}")
    outcome = simulate(setting_of(config), policy, itertools.chain((first,), requests))
    found = report_of(config, outcome, policy)
    if config.plot is not None:
        plots.fleet(found, config.plot)
    return found


def _shown(requests: Iterator[Request]) -> Iterator[Request]:
    """The same, with a line on stderr now and then."""
    begun = shown = time.monotonic()
    for n, request in enumerate(requests):
        yield request
        if n % 1024 == 0 and time.monotonic() - shown >= SHOW_S:
            shown = time.monotonic()
            print(
                f"{request.at_s / 3600:.1f} h of the trace, {n + 1:,} requests, {shown - begun:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def main(argv: Sequence[str]) -> int:
    """Run as the flags say; exit status 0, or 1 when requests failed. Raises ConfigError."""
    config = parse(argv)
    logging.getLogger("autoscaler").setLevel(
        logging.ERROR
    )  # what is refused and tried again is in the report
    if not config.quiet:
        print(f"seed {config.seed}", file=sys.stderr)
    found = carry_out(config)
    print(table(found))
    if config.json is not None:
        try:
            config.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
        except OSError as e:
            raise ConfigError(f"--json {config.json} cannot be written: {e.strerror}") from e
    return 0 if not found["requests"]["failed"] else 1
