"""What `vllm serve` and its forerunner run on an instance: flags, loading, serving."""

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, cast

from engine.profiles import get_profile, known_profiles, use_own_profiles
from engine.reference import SteppedModelServer
from fleet_client.listening import bind_socket
from localcloud.hub import HubAccess
from localcloud.paced.engine import VERSION, App, PacedEngine
from localcloud.paced.machine import SimulatedMachine
from localcloud.paced.served_model import ServedModel
from localcloud.paced.server import serve
from process.errors import ConfigError
from process.own_profiles import read_own_profiles

log = logging.getLogger("paced")


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return vLLM's flags that mean something to the paced engine, and the others as they are.

    Exits with status 2 for a wrong value.
    """
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
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--tool-call-parser", default=None)
    parser.add_argument("--reasoning-parser", default=None)
    parser.add_argument("--runner", choices=("auto", "generate", "pooling"), default="auto")
    parser.add_argument("--convert", choices=("auto", "none", "embed", "classify"), default="auto")
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--ssl-keyfile", default=None)
    parser.add_argument("--ssl-certfile", default=None)
    return parser.parse_known_args(argv)


def _count(text: str) -> int:
    """Return the whole number of 1 or more in a flag's text; 4k is 4,000 and 4K is 4,096, as in vLLM."""
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
    """Return the ASGI middleware class of that import path; raise ConfigError when there is none.

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
    """Return the name of the profile whose speed is imitated.

    It is one of the served names, else the profile with that model, else vllm-13.
    """
    known = known_profiles()
    for name in names:
        if name in known and known[name].shape is not None:
            return name
    same = [p.name for p in known.values() if p.model == model]
    return same[0] if same else "vllm-13"


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"(APIServer pid={os.getpid()}) %(levelname)s:     %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _die(*lines: str, status: int = 1) -> NoReturn:
    """Print last lines where vLLM would print them, and exit."""
    for line in lines:
        sys.stdout.write(f"(APIServer pid={os.getpid()}) {line}\n")
    sys.stdout.flush()
    sys.exit(status)


def serve_command() -> None:
    """Act as `vllm serve MODEL`, whose model is no flag, by the command line of this process."""
    match sys.argv[1:]:
        case ["serve", model, *flags] if not model.startswith("-"):
            main(["--model", model, *flags])
        case _:
            sys.exit("usage: vllm serve MODEL [flags]")


def main(argv: Sequence[str] | None = None) -> None:
    """Act as vLLM's api_server: wait for as long as loading takes on the pretended machine, then serve."""
    argv = list(sys.argv[1:] if argv is None else argv)
    flags, others = parse_flags(argv)
    _log_to_stdout()
    try:
        use_own_profiles(*read_own_profiles(None))
        machine = SimulatedMachine.read(os.environ.get("LOCALCLOUD_MACHINE"))
        if (death := HubAccess(**machine.hub).death(flags.model, argv, os.environ)) is not None:
            _die(*death.lines, status=death.status)
        _run(flags, others, machine)
    except ConfigError as e:
        _die(f"ValueError: {e}")


def _run(flags: argparse.Namespace, others: Sequence[str], machine: SimulatedMachine) -> None:
    names = tuple(flags.served_model_name or [flags.model])
    log.info("vLLM API server version %s: the paced engine of localcloud, no model is loaded", VERSION)
    log.info("model %s, served as %s", flags.model, ", ".join(names))
    if others:
        log.info("flags without a meaning here: %s", " ".join(others))
    if flags.tensor_parallel_size > machine.num_gpus:
        raise ConfigError(f"tensor parallel size {flags.tensor_parallel_size}, but {machine.num_gpus} GPUs")
    # As vLLM does: the port is taken before the model is loaded, and connections are refused until then.
    with bind_socket(flags.host, flags.port, listen=False) as sock:
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


def _make_app(flags: argparse.Namespace, names: tuple[str, ...], machine: SimulatedMachine) -> App:
    """Return the paced engine behind its middleware, the last one outermost as in vLLM; raise ConfigError."""
    name = profile_of(names, flags.model)
    profile = get_profile(name)
    timing = profile.timing_on(machine.gpu_name, flags.tensor_parallel_size, machine.told)
    max_model_len = flags.max_model_len or profile.max_model_len
    if flags.enable_auto_tool_choice and not flags.tool_call_parser:
        raise ConfigError("Error: --enable-auto-tool-choice requires --tool-call-parser")
    pooling = ("classify" if flags.convert == "classify" else "embed") if flags.runner == "pooling" else None
    model = ServedModel(
        names,
        flags.model,
        max_model_len,
        profile.expected_output_tokens,
        auto_tools=flags.enable_auto_tool_choice,
        tool_parser=flags.tool_call_parser,
        reasoning_parser=flags.reasoning_parser,
        pooling=pooling,
        chat_template=not HubAccess(**machine.hub).refuses_chats(flags.model),
    )
    try:
        server = SteppedModelServer(timing, flags.max_num_seqs, flags.max_num_batched_tokens)
        engine = PacedEngine(model, server)
    except ValueError as e:
        raise ConfigError(f"{e}: Engine core initialization failed") from e
    log.info("Using the pace of %s: GPU KV cache size: %d tokens", timing.name, timing.kv_tokens)
    app: App = engine
    for path in flags.middleware:
        app = load_middleware(path)(app)
    return app
