"""Whether the audit sees what it must see: the campaign with and without each of five fixes.

    python -m bench.chaos.undone [--json FILE]

Each run strikes with few kinds, those that the fix is against, and must miss the line of the audit that is
named. The same run with the fix must keep that line.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from bench.chaos.audit import audit, missed
from bench.chaos.campaign import CampaignSettings, run_seed
from bench.chaos.stack import StackSettings
from bench.chaos.undo import UNDONE
from bench.command import bench_parser, names_in, write_json
from fleet_client.flags import run_main

WRONGED = "machines destroyed or banned that were well"
FULL = "seconds from the last fault to the full fleet"
OVER = "seconds over max_instances"
HOLD = "longest processor time of a loadbalancer without yielding"
LEDGER = "the ledger's dollars to the cloud's, seed by seed"


@dataclass(frozen=True)
class Trial:
    """What shows that a fix is undone: kinds that strike, the line that must be missed, and the fleet."""

    kinds: tuple[str, ...]
    line: str
    hot: int = 3
    total: int = 4
    max_instances: int = 5
    storm_s: float = 75.0
    pause_s: float = 2.0


TRIALS: Mapping[str, Trial] = MappingProxyType(
    {
        "quorum": Trial(("unreachable-long",), WRONGED),
        "disbelief": Trial(("destroyed-behind", "kill-autoscaler"), FULL, hot=1, total=1, max_instances=1),
        "own-page": Trial(("cloud:list-missing",), OVER, total=5),
        "budgets": Trial(("host:huge-load",), HOLD),
        "clock": Trial(("clock-forward",), LEDGER),
    }
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run each trial with and without its fix; exit with 1 where the audit does not tell them apart."""
    parser = bench_parser("chaos.undone", __doc__)
    parser.add_argument("--only", default=",".join(UNDONE), metavar="NAME,NAME", help="fixes (default: all)")
    said = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    found: dict[str, dict[str, object]] = {}
    for name in names_in("--only", said.only, UNDONE):
        found[name] = run_trial(name, TRIALS[name])
        print(name, *(f"{key}: {value}" for key, value in found[name].items()), sep="\n    ", flush=True)
        write_json(said.json, found)
    if not all(one["told apart"] for one in found.values()):
        raise SystemExit(1)


def run_trial(name: str, trial: Trial) -> dict[str, object]:
    """Run the trial with the fix and without it."""
    figures: dict[str, object] = {"line": trial.line}
    lines = {}
    for how, undone in (("with it", None), ("without it", name)):
        stack = StackSettings(
            1, hot=trial.hot, total=trial.total, max_instances=trial.max_instances, undo=undone
        )
        settings = CampaignSettings(
            1, trial.storm_s / 60.0, trial.kinds, storm_s=trial.storm_s, pause_s=trial.pause_s, stack=stack
        )
        lines[how] = audit([run_seed(settings)])
        figures[how] = next(line.figure for line in lines[how] if line.what == trial.line)
    kept = trial.line not in {line.what for line in missed(lines["with it"])}
    figures["told apart"] = kept and trial.line in {line.what for line in missed(lines["without it"])}
    return figures


if __name__ == "__main__":
    run_main(main)
