"""What the campaign promises, a line each: the figure over all seeds, its target, and whether it was kept."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.chaos.campaign import Figures, Size
from bench.chaos.kinds import all_kinds, group_of
from bench.chaos.stack import LOADBALANCERS
from bench.chaos.users import CUT, DOUBLED, MISCOUNTED, OK

DEFAULT_SHARE = 0.02
"""Share of requests that may fail with the openai package's default retries."""

LEDGER = 0.995, 1.005
"""Ratio of the ledger's dollars to the cloud's, for the time that the ledger was there."""

ODD_DOLLARS = "looks at GET /costs in the run that were far off the cloud's dollars"

HOLD_S = 0.1
"""Seconds of processor for which a loadbalancer may hold its loop."""

GROWTH = 0.05
"""Share by which memory and handles may have grown."""

SPARE_MB, SPARE_HANDLES = 4.0, 64
"""What a process may have more, whatever its size: the arena of a thread; connections that a storm
has left, which are kept alive for two minutes."""


@dataclass(frozen=True)
class Line:
    """One promise. kept is None where there is nothing to judge."""

    what: str
    target: str
    figure: str
    kept: bool | None
    details: tuple[str, ...] = ()


CAMPAIGN_S, LEAST_FAULTS, LEAST_OF_A_KIND = 3600.0, 1000, 20
"""Seconds from which on the seeds are a campaign; its faults, and those of each kind."""


def audit(seeds: Sequence[Figures]) -> list[Line]:
    """Return all lines, for all seeds together."""
    return [*_faults(seeds), *_requests(seeds), *_fleet(seeds), *_processes(seeds), *_logs(seeds)]


def missed(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that were not kept."""
    return [line for line in lines if line.kept is False]


def _faults(seeds: Sequence[Figures]) -> Iterator[Line]:
    struck: Counter[str] = Counter()
    for figures in seeds:
        for name, times in figures.faults.items():
            struck[group_of(name)] += times
    all_groups = {group_of(name) for name, kind in all_kinds().items() if "trial" not in kind.tags}
    rare = {name: struck[name] for name in sorted(all_groups) if struck[name] < LEAST_OF_A_KIND}
    seconds = sum(figures.seconds for figures in seeds)
    enough = struck.total() >= LEAST_FAULTS and not rare
    yield Line(
        "faults",
        f"{LEAST_FAULTS:,}, each kind {LEAST_OF_A_KIND} times",
        f"{struck.total()} of {len(struck)} kinds in {seconds / 60.0:.0f} minutes, "
        f"{min((struck[name] for name in all_groups), default=0)} or more of each",
        enough if seconds >= CAMPAIGN_S else None,
        (", ".join(f"{name} {times}" for name, times in rare.items()),),
    )


def _requests(seeds: Sequence[Figures]) -> Iterator[Line]:
    for user, target, what in (
        ("patient", 0.0, "requests that fail after 120 s of their client's retries, a machine in reach"),
        ("default", DEFAULT_SHARE, "requests that fail with the openai package's default retries, the same"),
    ):
        counts = [f.outcomes.get(user, Counter()) for f in seeds]
        asked = sum(sum(c.values()) for c in counts)
        failed = sum(n for c in counts for outcome, n in c.items() if outcome in ("failed", "unfinished"))
        dark = sum(f.in_the_dark[user] for f in seeds)
        share = (failed - dark) / asked if asked else 0.0
        yield Line(
            what,
            f"{100 * target:g} %",
            f"{failed - dark} of {asked}, {100 * share:.2f} %; {dark} more with no machine in reach",
            share <= target if asked else None,
            tuple(x for f in seeds for x in f.failures if f" {user}: " in x),
        )
    for outcome, what in (
        (CUT, "answers cut in silence"),
        (DOUBLED, "doubled"),
        (MISCOUNTED, "counted wrongly"),
    ):
        found = sum(c[outcome] for f in seeds for c in f.outcomes.values())
        whole = sum(c[OK] for f in seeds for c in f.outcomes.values())
        yield Line(what, "0", f"{found}, and {whole} whole ones", found == 0)
    twice = sum(f.served_twice for f in seeds)
    yield Line("tokens served twice", "0", f"{twice} in {sum(f.uses for f in seeds)} uses", twice == 0)


def _fleet(seeds: Sequence[Figures]) -> Iterator[Line]:
    wronged = [w for f in seeds for w in f.wronged]
    yield Line(
        "machines destroyed or banned that were well", "0", str(len(wronged)), not wronged, tuple(wronged)
    )
    over = [x for f in seeds for x in f.over]
    for what, seconds in (
        ("seconds over max_instances", sum(f.over_instances_s for f in seeds)),
        ("seconds over max_dollars_per_hour", sum(f.over_usd_s for f in seeds)),
    ):
        yield Line(what, "0", f"{seconds:.1f}", seconds == 0.0, tuple(over[:20]))
    left = [x for f in seeds for x in f.left_behind]
    yield Line("machines and processes left", "0", str(len(left)), not left, tuple(left))
    first = max((f.first_full_s for f in seeds), default=0.0)
    full = [s for f in seeds for s in f.full_after_s]
    yield Line(
        "seconds from the last fault to the full fleet",
        f"one start and one turn: {first + 1.0:.0f}",
        f"worst {max(full):.0f} of {len(full)}, median {sorted(full)[len(full) // 2]:.0f}"
        if full
        else "none",
        max(full) <= first + 1.0 if full else None,
        tuple(f"seed {f.seed}: {', '.join(f'{s:.0f}' for s in f.full_after_s)}" for f in seeds),
    )
    ratios = [(f, f.ledger_usd / f.cloud_usd) for f in seeds if f.cloud_usd > 0.0]
    yield Line(
        "the ledger's dollars to the cloud's, seed by seed",
        f"{LEDGER[0]:g} to {LEDGER[1]:g}",
        ", ".join(f"{ratio:.4f}" for _, ratio in ratios) or "none",
        all(LEDGER[0] <= ratio <= LEDGER[1] for _, ratio in ratios) and len(ratios) == len(seeds),
        tuple(
            f"seed {f.seed}: {f.ledger_usd:.5f} of {f.cloud_usd:.5f} $, unknown {f.unknown_s:.0f} s"
            for f, _ in ratios
        ),
    )

    odd = [f"seed {f.seed}: {x}" for f in seeds for x in f.odd_dollars]
    yield Line(ODD_DOLLARS, "0", str(len(odd)), not odd, tuple(odd))


def _processes(seeds: Sequence[Figures]) -> Iterator[Line]:
    holds = {name: max((f.holds_s.get(name, 0.0) for f in seeds), default=0.0) for name in LOADBALANCERS}
    longest = max(holds.values(), default=0.0)
    yield Line(
        "longest processor time of a loadbalancer without yielding",
        f"{HOLD_S:g} s",
        f"{longest:.3f} s",
        longest <= HOLD_S,
        tuple(f"seed {f.seed}: {name} {held:.3f} s" for f in seeds for name, held in f.holds_s.items()),
    )
    grown = [
        f"seed {f.seed}: {name} {begin.mb:.0f} to {f.end[name].mb:.0f} MB, "
        f"{begin.handles} to {f.end[name].handles} handles"
        for f in seeds
        for name, begin in f.begin.items()
        if name in f.end and _has_grown(begin, f.end[name])
    ]
    ratios = [f.end[name].mb / begin.mb for f in seeds for name, begin in f.begin.items() if name in f.end]
    yield Line(
        "memory and handles at the end",
        f"within {100 * GROWTH:g} %, or {SPARE_MB:g} MB and {SPARE_HANDLES}",
        f"memory {min(ratios):.2f} to {max(ratios):.2f} of the begin" if ratios else "none",
        not grown if ratios else None,
        tuple(grown),
    )


def _has_grown(begin: Size, end: Size) -> bool:
    return end.mb > max((1.0 + GROWTH) * begin.mb, begin.mb + SPARE_MB) or end.handles > max(
        (1.0 + GROWTH) * begin.handles, begin.handles + SPARE_HANDLES
    )


def _logs(seeds: Sequence[Figures]) -> Iterator[Line]:
    lines = sum(f.logs.lines for f in seeds)
    tracebacks = [t for f in seeds for t in f.logs.tracebacks]
    yield Line(
        "tracebacks in any log", "0", f"{len(tracebacks)} in {lines} lines", not tracebacks, tuple(tracebacks)
    )
    secrets = [s for f in seeds for s in f.logs.secrets]
    yield Line("secrets in any log", "0", str(len(secrets)), not secrets, tuple(secrets))
    errors = [f"seed {f.seed}: {e}" for f in seeds for e in f.errors]
    yield Line("errors of the campaign itself", "0", str(len(errors)), not errors, tuple(errors))
