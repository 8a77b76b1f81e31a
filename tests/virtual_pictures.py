"""Draw the three pictures of virtual time in docs/: a good day, a burst, and a fleet that is too small.

python -m tests.virtual_pictures [DIR]
"""

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process.progress import Progress
from simulation import plots
from simulation.virtual import command
from tests.paths import ROOT

HOUR_S = 3600.0


@dataclass(frozen=True)
class Picture:
    """One picture: its file, its headline, the flags of its run, and what is said below, made of the report.

    load: length and requests a second at each second of a trace of its own; None: the flags name one.
    """

    name: str
    headline: str
    detail: Callable[[Mapping[str, Any]], str]
    flags: tuple[str, ...]
    load: tuple[float, Callable[[float], float]] | None = None


PICTURES = (
    Picture(
        "good-day",
        "A good day",
        lambda r: (
            f"Machines are started and stopped with the load: {r['objective']['met_share']:.1%} of requests "
            f"in time for ${r['cost_usd']['total']:.0f}; ${r['cost_usd']['if_all_hot']:.0f} if all ran on."
        ),
        ("--trace", "synthetic:days=1,rate=3,swing=1.6,bursts=1,height=1.6", "--seed", "2"),
    ),
    Picture(
        "burst",
        "A burst",
        lambda _: "Stopped machines are started at once. Until they serve, requests wait, and come late.",
        ("--seed", "1"),
        (1.5 * HOUR_S, lambda at: 7.5 if HOUR_S <= at < HOUR_S + 900.0 else 3.0),
    ),
    Picture(
        "too-small",
        "A fleet that is too small",
        lambda _: "Three machines, and for an hour more load than they can serve: the queue only grows.",
        ("--seed", "1", "--policy", "fixed", "--policy-param", "hot=3", "--max-instances", "3"),
        (2.5 * HOUR_S, lambda at: 7.0 if 0.5 * HOUR_S <= at < 1.5 * HOUR_S else 2.5),
    ),
)


def main(directory: Path) -> None:
    """Play the runs and draw their pictures."""
    with tempfile.TemporaryDirectory() as made:
        for picture in Progress().over(PICTURES, lambda p: p.name):
            flags = list(picture.flags)
            if picture.load is not None:
                trace = Path(made) / f"{picture.name}.csv"
                trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(_rows(*picture.load)))
                flags += ["--trace", str(trace)]
            report = command.carry_out(command.parse(["--virtual", "--quiet", *flags]))
            path = directory / f"{picture.name}.png"
            plots.fleet(report, path, picture.headline, picture.detail(report))
            print(f"{path}: {picture.detail(report)}", flush=True)


def _rows(length_s: float, rate: Callable[[float], float]) -> Iterator[str]:
    """Yield the rows of a trace with Poisson arrivals of that rate and the lengths of conversations."""
    rng = random.Random(5)
    at = 0.0
    while (at := at + rng.expovariate(rate(at))) < length_s:
        prompt, output = (min(2000, round(rng.lognormvariate(mu, 0.7))) for mu in (6.2, 4.9))
        yield f"{at:.3f},{max(1, prompt)},{max(1, output)}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
