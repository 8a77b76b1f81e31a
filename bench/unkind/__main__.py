"""Each unkindness of the local cloud alone: commit 0abccd6 must fail of it, the present code must not.

    python -m bench.unkind [--only ROW,ROW] [--json FILE]

The old code is taken from git (`git archive 0abccd6`) into a temporary directory and runs with the present
virtual environment against the present local cloud. Exits with 1 where a row does not tell the two apart.
"""

import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from bench.children import ROOT
from bench.command import bench_parser, machine, names_in, write_json
from bench.unkind.play import play
from bench.unkind.rows import MET_BEFORE, ROWS, Verdict
from fleet_client.flags import run_main

OLD = "0abccd6"
"""The commit before the local cloud was unkind."""

PRESENT = "present"


def checkout(into: Path) -> Path:
    """Unpack the old commit into that directory, and return it."""
    packed = subprocess.run(("git", "archive", OLD), cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as tar:
        tar.extractall(into, filter="data")
    return into


def verdict_of(row: str, code: Path, scratch: Path) -> Verdict:
    """Play a row with the code in that directory; return whether it did right."""
    return ROWS[row](lambda day: play(code, day, scratch))


def main(argv: Sequence[str] | None = None) -> None:
    """Play each row with both versions and print what became of them; exit with 1 where one is wrong."""
    parser = bench_parser("unkind", __doc__)
    parser.add_argument("--only", default=",".join(ROWS), metavar="ROW,ROW", help="rows (default: all)")
    said = parser.parse_args(argv)
    found: dict[str, dict[str, Verdict]] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unkind-") as scratch:
        versions = {OLD: checkout(Path(scratch, "old")), PRESENT: ROOT}
        for name in names_in("--only", said.only, ROWS):
            with ThreadPoolExecutor(len(versions)) as pool:  # side by side: both mostly wait
                played = {
                    version: pool.submit(verdict_of, name, code, Path(scratch, f"{name}-{version}"))
                    for version, code in versions.items()
                }
            found[name] = {version: future.result() for version, future in played.items()}
            for version, verdict in found[name].items():
                shown = "right" if verdict.right else "WRONG"
                print(f"{name:18} {version:8} {shown:6} {verdict.figures}", flush=True)
    wrong = [n for n, of in found.items() if not of[PRESENT].right or of[OLD].right != (n in MET_BEFORE)]
    print(f"{time.monotonic() - begun:.0f} s; not told apart: {', '.join(wrong) or 'none'}")
    rows = {name: {version: asdict(verdict) for version, verdict in of.items()} for name, of in found.items()}
    write_json(said.json, {"machine": machine(), "rows": rows, "not_told_apart": wrong})
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
