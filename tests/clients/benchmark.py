"""AIPerf, tried: `benchmark.py BASE_URL`, in the environment .venv-clients/aiperf.

Prints one JSON object, as programs.py does. Each check is a run of its own; AIPerf calls no tools.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def make_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes, since AIPerf's own ones are downloaded at each first use."""
    tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
    split, decoders = tokenizers.pre_tokenizers.ByteLevel, tokenizers.decoders.ByteLevel
    alphabet = sorted(split.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({one: n for n, one in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = split(add_prefix_space=False), decoders()
    special = {"bos_token": alphabet[0], "eos_token": alphabet[1], "pad_token": alphabet[1]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(directory)


def main(base: str) -> None:
    """Try AIPerf and print what works."""
    found = {"tools": "-"}
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        make_tokenizer(home / "tokenizer")

        def run(name: str, *flags: str) -> list[dict[str, Any]]:
            """Return what AIPerf says of each request."""
            program = str(Path(sys.executable).with_name("aiperf"))
            command = [program, "profile", "-m", "vllm-13", "--url", base.removesuffix("/v1"), *flags]
            command += ["--endpoint-type", "chat", "--tokenizer", str(home / "tokenizer"), "--isl", "20"]
            command += ["--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--workers-max", "2"]
            command += ["--artifact-dir", str(home / name)]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
            told = home / name / "profile_export.jsonl"
            if not told.exists():
                raise ChildProcessError(f"exit status {ran.returncode}: {ran.stdout[-150:]}")
            return [json.loads(line) for line in told.read_text().splitlines()]

        def answered(name: str, count: int, *flags: str) -> str:
            said = run(name, "--osl", "8", "--request-count", str(count), "--concurrency", str(count), *flags)
            tokens = [
                one["metrics"]["output_sequence_length"]["value"] for one in said if not one.get("error")
            ]
            return "" if len(tokens) == count and all(tokens) else f"{len(tokens)} of {count} answered"

        def ended(name: str, kind: str, *flags: str, also: Sequence[str | None] = ()) -> str:
            long = ("--osl", "300", "--extra-inputs", "ignore_eos:true")  # else some answers are short
            said = run(name, *long, "--request-count", "4", "--concurrency", "4", *flags)
            kinds = [(one.get("error") or {}).get("type") for one in said]
            return "" if kind in kinds and {*kinds} <= {kind, *also} else f"ended with {kinds}"

        stopped = ("--streaming", "--request-cancellation-rate", "100", "--request-cancellation-delay", "0.5")
        checks: dict[str, Callable[[], str]] = {
            "chat": lambda: answered("chat", 1),
            "stream": lambda: answered("stream", 16, "--streaming"),
            "cancel": lambda: ended("cancel", "RequestCancellationError", *stopped, also=[None]),
            "timeout": lambda: ended("timeout", "TimeoutError", "--request-timeout-seconds", "0.5"),
        }
        for check, call in checks.items():
            try:
                found[check] = call()
            except (OSError, LookupError, ValueError, subprocess.TimeoutExpired) as e:
                found[check] = f"{type(e).__name__}: {e}".replace("\n", " ")[:200]
    found["16 at once"] = found["stream"]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
