"""Whether the audit sees what it must see: the campaign with and without each of five fixes.

    python -m bench.chaos.undone [--json FILE]

Each run strikes with few kinds, those that the fix is against, and must miss the line of the audit that is
named. The same run with the fix must keep it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from bench.chaos.audit import ODD_DOLLARS, audit
from bench.chaos.campaign import CampaignSettings, run_seed
from bench.chaos.stack import StackSettings
from bench.chaos.undo import UNDONE
from bench.command import bench_parser, names_in, write_json
from fleet_client.flags import run_main

WRONGED = "machines destroyed or banned that were well"
FULL = "seconds from the last fault to the full fleet"
OVER = "seconds over max_instances"
FAILED = "requests that fail with the openai package's default retries, the same"


@dataclass(frozen=True)
class Trial:
    """What shows that a fix is undone: the kinds that strike, the line that must be missed, and the fleet."""

    kinds: tuple[str, ...]
    line: str
    hot: int = 3
    total: int = 4
    max_instances: int = 5
    storm_s: float = 60.0
    most: int | None = None


TRIALS: Mapping[str, Trial] = MappingProxyType(
    {
        "quorum": Trial(("unreachable-long",), WRONGED, storm_s=75.0),
        "own-page": Trial(("destroyed-behind",), FULL, hot=1, total=1, max_instances=1, storm_s=30.0, most=1),
        "absence": Trial(("list-missing-long",), OVER, total=5),
        "silence": Trial(("kill-loadbalancer-1", "kill-loadbalancer-2"), FAILED, storm_s=40.0),
        "clock": Trial(("clock-forward", "model-killed"), ODD_DOLLARS, storm_s=40.0),
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
    told: dict[str, object] = {"line": trial.line}
    kept = {}
    for how, undone in (("with it", None), ("without it", name)):
        stack = StackSettings(
            1, hot=trial.hot, total=trial.total, max_instances=trial.max_instances, undo=undone
        )
        settings = CampaignSettings(
            *(1, trial.storm_s / 60.0, trial.kinds, 2.0, trial.storm_s, 2.0, trial.most), stack=stack
        )
        figures = run_seed(settings)
        line = next(line for line in audit([figures]) if line.what == trial.line)
        told[how] = " ".join((line.figure, *line.details[:3]))
        kept[how] = line.kept is not False
    told["told apart"] = kept == {"with it": True, "without it": False}
    return told


if __name__ == "__main__":
    run_main(main)
