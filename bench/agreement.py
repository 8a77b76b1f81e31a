"""Whether sim.py and AIPerf measure the same: one load through both, in turn, on one local machine.

    python -m bench.agreement [--aiperf PROGRAM] [--pairs N] [--seconds S] [--json FILE]

The load is a trace with Poisson arrivals, sent at its times by both: by sim.py over its transport, by AIPerf
(`--fixed-schedule`) through the gateway. The machine is hot all the time, so that nothing differs but who
measures. Both count tokens as the model server does.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.children import ROOT, child, free_port, said
from bench.command import add_counts, bench_parser, machine, write_json
from fleet_client.flags import run_main
from localcloud.paced.shapes import CHARACTERS_A_TOKEN
from process.errors import ConfigError
from process.progress import Progress
from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig

AIPERF = ROOT / ".venv-clients" / "aiperf" / "bin" / "aiperf"
RATE = 2.0
"""Requests a second: half of what one RTX 4090 answers of these, so that hardly any waits."""
TARGET = 0.03
"""Relative difference of means that the issue allows."""
LIMIT_S = 900.0
"""Seconds that a run may take."""

FIGURES: Mapping[str, tuple[str, float, Sequence[str]]] = {
    # ours: AIPerf's name, its unit in ours, where it stands in our report
    "TTFT": ("time_to_first_token", 1e-3, ("latency_s", "ttft", "mean")),
    "TPOT": ("inter_token_latency", 1e-3, ("latency_s", "tpot", "mean")),
    "E2EL": ("request_latency", 1e-3, ("latency_s", "e2e", "mean")),
    "output throughput": ("output_token_throughput", 1.0, ("throughput", "output_tokens_s")),
    "request throughput": ("request_throughput", 1.0, ("throughput", "requests_s")),
}
"""What is compared: means, and throughputs."""

TOKENIZER = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
    "from tests.clients.benchmark import make_tokenizer; make_tokenizer(Path(sys.argv[2]))"
)


def write_load(directory: Path, seconds: int, seed: int) -> tuple[Path, Path]:
    """Write one load as a table for sim.py and as a trace for AIPerf, whose tokens are single characters."""
    rng = random.Random(seed)
    rows, lines, at = ["arrival_s,prompt_tokens,output_tokens"], [], 0.0
    while at < seconds:
        prompt = min(2000, max(8, round(rng.lognormvariate(5.4, 0.8))))
        output = min(800, max(8, round(rng.lognormvariate(4.9, 0.7))))
        rows.append(f"{at:.3f},{prompt},{output}")
        line = {
            "timestamp": round(1e3 * at),
            "input_length": prompt * CHARACTERS_A_TOKEN,
            "output_length": output,
        }
        lines.append(json.dumps(line))
        at += rng.expovariate(RATE)
    ours, theirs = directory / "load.csv", directory / "load.jsonl"
    ours.write_text("\n".join(rows) + "\n")
    theirs.write_text("\n".join(lines) + "\n")
    return ours, theirs


def by_sim(stack: LocalStack, load: Path, out: Path) -> dict[str, float]:
    """Send the load with sim.py; return the figures of its report."""
    command = [sys.executable, "sim.py", "--quiet", "--seed", "1", "--trace", str(load), "--json", str(out)]
    command += ["--loadbalancer", stack.loadbalancer_url, "--autoscaler", stack.autoscaler_url]
    command += ["--state-dir", str(stack.state_dir)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    report = json.loads(out.read_text())
    found = {}
    for name, (_, _, path) in FIGURES.items():
        value: Any = report
        for key in path:
            value = value[key]
        found[name] = float(value)
    return found | {"requests": report["requests"]["completed"], "prompt tokens": report["tokens"]["prompt"]}


def by_aiperf(program: Path, base: str, load: Path, directory: Path) -> dict[str, float]:
    """Send the load with AIPerf; return the same figures of what it exports."""
    tokenizer, out = directory / "tokenizer", directory / "aiperf"
    if not tokenizer.exists():
        python = str(program.with_name("python"))
        subprocess.run([python, "-c", TOKENIZER, str(ROOT), str(tokenizer)], check=True, timeout=LIMIT_S)
    command = [str(program), "profile", "-m", "vllm-13", "--url", base, "--endpoint-type", "completions"]
    command += ["--streaming", "--tokenizer", str(tokenizer), "--use-server-token-count"]
    command += ["--input-file", str(load), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
    command += ["--extra-inputs", "ignore_eos:true", "--ui", "none", "--workers-max", "2"]
    command += ["--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    export = out / "profile_export_aiperf.json"
    if not export.exists():
        raise ConfigError(f"{program} ended with status {ran.returncode}: {ran.stdout[-300:]}")
    said_of = json.loads(export.read_text())
    export.unlink()
    found = {name: float(said_of[key]["avg"]) * unit for name, (key, unit, _) in FIGURES.items()}
    counts = {"requests": said_of["request_count"]["avg"], "prompt tokens": said_of["total_isl"]["avg"]}
    return found | counts


@contextmanager
def gateway(stack: LocalStack, directory: Path) -> Iterator[str]:
    """Run a gateway in front of the stack; gives its address."""
    command = [
        sys.executable,
        "gateway.py",
        "--port",
        str(free_port()),
        "--loadbalancer",
        stack.loadbalancer_url,
    ]
    with child(command, directory / "gateway.log") as one:
        said("the gateway", one, r"(http://127\.0\.0\.1:\d+)")
        yield f"http://127.0.0.1:{command[3]}"


def compare(program: Path, pairs: int, seconds: int) -> dict[str, Any]:
    """Return the figures of both, run after run, and how far their means are apart."""
    sims: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="agreement-") as made:
        directory = Path(made)
        ours, trace = write_load(directory, seconds, seed=1)
        one = StackConfig(instances=1, max_instances=1, hot=1, seed=1)
        with LocalStack(one) as stack, gateway(stack, directory) as base:
            by_sim(stack, ours, directory / "warm.json")  # the loadbalancer measures the machine
            for n in Progress().over(range(pairs), lambda n: f"pair {n + 1}"):
                sims.append(by_sim(stack, ours, directory / f"sim-{n}.json"))
                theirs.append(by_aiperf(program, base, trace, directory))
    rows = {}
    for name in sims[0]:
        a, b = (statistics.mean(run[name] for run in runs) for runs in (sims, theirs))
        rows[name] = {"sim": a, "aiperf": b, "difference": a / b - 1.0}
    return {"rows": rows, "runs": {"sim": sims, "aiperf": theirs}, "seconds": seconds, "machine": machine()}


def main() -> None:
    """Print what both measured; exit with 1 where a mean differs by more than TARGET."""
    parser = bench_parser("agreement", __doc__)
    parser.add_argument(
        "--aiperf",
        type=Path,
        default=AIPERF,
        metavar="PROGRAM",
        help="AIPerf (default .venv-clients/aiperf's)",
    )
    add_counts(
        parser, ("--pairs", 3, "runs of each, in turn"), ("--seconds", 90, "length of the load in seconds")
    )
    args = parser.parse_args()
    if not args.aiperf.exists():
        raise ConfigError(
            f"--aiperf {args.aiperf}: there is no such program: make bench-agreement installs it"
        )
    found = compare(args.aiperf.absolute(), args.pairs, args.seconds)
    for name, row in found["rows"].items():
        print(f"{name:20} sim {row['sim']:12.4f}   AIPerf {row['aiperf']:12.4f}   {row['difference']:+.2%}")
    write_json(args.json, found)
    if any(abs(row["difference"]) > TARGET for row in found["rows"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
