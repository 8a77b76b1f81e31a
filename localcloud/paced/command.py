"""TODO: say what this is."""

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from engine.profiles import PROFILES
from engine.reference import ModelServer
from engine.timing import PROFILE_MODELS, timing_for
from localcloud.paced.asgi import App
from localcloud.paced.completion_request import Model
from localcloud.paced.engine import VERSION, PacedEngine, log
from localcloud.paced.server import _bind, serve
from process.errors import ConfigError

# --- outside world ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What localcloud says of the machine we run on, in the file that LOCALCLOUD_MACHINE names.

    load_s: from start to ready; start_s instead if the file `loaded` exists. fatal_line: said instead of
    getting ready.
    """

    gpu_name: str = "RTX 4090"
    num_gpus: int = 1
    load_s: float = 0.0
    start_s: float = 0.0
    fatal_line: str | None = None
    loaded: str | None = None

    @classmethod
    def read(cls, path: str | None) -> "Machine":
        """From the file, or one RTX 4090 that is ready at once without a file; raises ConfigError."""
        if not path:
            return cls()
        try:
            said = json.loads(Path(path).read_text())
            return cls(
                gpu_name=str(said["gpu_name"]),
                num_gpus=int(said["num_gpus"]),
                load_s=float(said["load_s"]),
                start_s=float(said["start_s"]),
                fatal_line=said.get("fatal_line"),
                loaded=said.get("loaded"),
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"LOCALCLOUD_MACHINE={path} cannot be used: {type(e).__name__}: {e}") from e

    @property
    def ready_s(self) -> float:
        """Seconds until it is ready, this time."""
        return self.start_s if self.loaded and Path(self.loaded).exists() else self.load_s


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of vLLM's that mean something here, the others). Exits with 2 for a wrong value."""
    parser = argparse.ArgumentParser(
        prog="vllm.entrypoints.openai.api_server",
        description="localcloud's paced engine under the name of vLLM: no model is loaded",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+", default=None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=8000)
    parser.add_argument("--tensor-parallel-size", "-tp", type=_count, default=1)
    parser.add_argument("--max-model-len", type=_count, default=None)
    parser.add_argument("--max-num-seqs", type=_count, default=None)
    parser.add_argument("--max-num-batched-tokens", type=_count, default=None)
    parser.add_argument("--quantization", "-q", default=None)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--ssl-keyfile", default=None)
    parser.add_argument("--ssl-certfile", default=None)
    return parser.parse_known_args(argv)


def _count(text: str) -> int:
    """A whole number of 1 or more; 4k is 4,000 and 4K is 4,096, as vLLM reads it."""
    factor = {"k": 1000, "K": 1024}.get(text[-1:], 1)
    value = int(text[:-1] if factor > 1 else text) * factor
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"wanted 0 to 65535, got {text}")
    return value


def load_middleware(path: str) -> Callable[[App], App]:
    """The ASGI middleware class of that import path; raises ConfigError.

    vLLM also takes coroutine functions, which only make sense with Starlette; those are refused.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"--middleware {path} cannot be loaded: {type(e).__name__}: {e}") from e
    if not isinstance(found, type):
        raise ConfigError(f"--middleware {path}: wanted an ASGI middleware class")
    return cast(Callable[[App], App], found)


def profile_of(names: Sequence[str], model: str) -> str:
    """The profile that is served: one among the names, else one with that model, else vllm-13."""
    for name in names:
        if name in PROFILE_MODELS:
            return name
    same = [p.name for p in PROFILES.values() if p.model == model]
    return same[0] if same else "vllm-13"


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"(APIServer pid={os.getpid()}) %(levelname)s:     %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _die(line: str) -> NoReturn:
    """The line, where vLLM's last words are found, and exit code 1."""
    sys.stdout.write(f"(APIServer pid={os.getpid()}) {line}\n")
    sys.stdout.flush()
    sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Be vLLM's api_server: load for as long as the machine says, then serve."""
    flags, others = parse_flags(sys.argv[1:] if argv is None else argv)
    _log_to_stdout()
    try:
        _run(flags, others, Machine.read(os.environ.get("LOCALCLOUD_MACHINE")))
    except ConfigError as e:
        _die(f"ValueError: {e}")


def _run(flags: argparse.Namespace, others: Sequence[str], machine: Machine) -> None:
    names = tuple(flags.served_model_name or [flags.model])
    log.info("vLLM API server version %s: the paced engine of localcloud, no model is loaded", VERSION)
    log.info("model %s, served as %s", flags.model, ", ".join(names))
    if others:
        log.info("flags without a meaning here: %s", " ".join(others))
    if flags.tensor_parallel_size > machine.num_gpus:
        raise ConfigError(f"tensor parallel size {flags.tensor_parallel_size}, but {machine.num_gpus} GPUs")
    # As vLLM does: the port is taken before the model is loaded, and nobody is let in until it is.
    sock = _bind(flags.host, flags.port)
    app = _make_app(flags, names, machine)
    log.info("Starting to load model %s...", flags.model)
    if machine.fatal_line is not None:
        time.sleep(machine.ready_s / 2.0)
        _die(f"ERROR {machine.fatal_line}")
    started = time.monotonic()
    time.sleep(machine.ready_s)
    log.info("Model loading took %.2f seconds", time.monotonic() - started)
    log.info("Starting vLLM API server 0 on http://%s:%d", *sock.getsockname()[:2])
    serve(app, sock, flags.ssl_certfile, flags.ssl_keyfile)


def _make_app(flags: argparse.Namespace, names: tuple[str, ...], machine: Machine) -> App:
    """The engine behind its middleware, the last one given outermost as with vLLM; raises ConfigError."""
    name = profile_of(names, flags.model)
    profile = PROFILES[name]
    timing = timing_for(name, machine.gpu_name, flags.tensor_parallel_size)
    max_model_len = flags.max_model_len or profile.max_model_len
    model = Model(names, flags.model, max_model_len, profile.expected_output_tokens)
    try:
        server = ModelServer(timing, flags.max_num_seqs, flags.max_num_batched_tokens)
        engine = PacedEngine(model, server)
    except ValueError as e:
        raise ConfigError(f"{e}: Engine core initialization failed") from e
    log.info("Using the pace of %s: GPU KV cache size: %d tokens", timing.name, timing.kv_tokens)
    app: App = engine
    for path in flags.middleware:
        app = load_middleware(path)(app)
    return app
