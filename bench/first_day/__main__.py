"""An operator's first day on an unkind marketplace: what it cost, and what it would have cost at best.

    python -m bench.first_day [--speedup 60] [--hours 10] [--seed 1] [--keep DIR] [--json FILE]

Every command of docs/vast-ai.md's first hour is run as it stands there, against a local cloud with
`--realism harsh`. Between them happens what the page tells of: each act below says what it does and checks
what the operator is told. --hours are hours of the cloud; users ask all the time while the fleet serves.

The ideal is what a clairvoyant would have paid for the same requests (bench/first_day/ideal.py).
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.command import bench_parser, machine, write_json
from bench.first_day import acts
from bench.first_day.hub import gated_hub
from bench.first_day.ideal import as_json, ideal_usd
from bench.first_day.stage import Stage, stage
from engine.profiles import get_profile
from fleet_client.flags import run_main
from fleet_client.private_files import make_private_dir


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
        yield make_private_dir(keep)
        return
    with tempfile.TemporaryDirectory(prefix="first-day-") as made:
        yield Path(made)


def play(on: Stage, hours: float) -> dict[str, Any]:
    """Play the day; return what was measured. Raises AssertionError where the operator is told wrong."""
    day = acts.FirstDay(on, hours)
    for act in acts.ACTS:
        print(f"-- {(act.__doc__ or '').splitlines()[0]}", flush=True)
        act(day)
    ideal = ideal_usd(day.played())
    found = day.figures() | {"ideal": ideal, "ratio": day.spent_usd / ideal["usd"]}
    return found | {"day": as_json(day.played())}


def main() -> None:
    """Play a first day; print and keep what it cost."""
    parser = bench_parser("first_day", __doc__)
    parser.add_argument("--speedup", type=float, default=60.0, metavar="K", help="(default %(default)g)")
    parser.add_argument(
        "--hours",
        type=float,
        default=10.0,
        metavar="H",
        help="hours of the cloud it serves (default %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the cloud (default %(default)d)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave all logs there (default: none is kept)"
    )
    args = parser.parse_args()
    flags = ["--realism", "harsh", "--credit", f"{acts.CREDIT_USD:g}", "--seed", str(args.seed), *acts.CLOUD]
    with (
        _directory(args.keep) as root,
        gated_hub(get_profile(acts.MODEL).model, acts.TOKEN) as hub,
        stage(root, args.speedup, flags, acts.KEY, hub) as on,
    ):
        try:
            figures = play(on, args.hours)
        finally:
            (root / "commands.json").write_text(json.dumps([vars(one) for one in on.log], indent=1))
    write_json(args.json, figures | {"machine": machine(), "speedup": args.speedup, "seed": args.seed})
    shown = {name: value for name, value in figures.items() if name != "day"}
    print(json.dumps(shown, indent=1))
    if figures["trouble"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
