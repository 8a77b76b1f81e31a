"""The command `profile add`: a profile of a model from its own files, and which GPUs fit at what price."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from engine.model_config import ModelFacts, read_config
from engine.new_profile import make_entry, profile_name
from engine.profile import Profile
from engine.profile_entry import NAME, REPOSITORY, WORD, ProfileEntry
from engine.profile_table import entries_in, written
from engine.profiles import PROFILES
from engine.slo import Slo
from fleet.fits import fits_of
from fleet.market import sorted_out
from fleet.outside.config import SERVE_ONLY, AutoscalerConfig, vast_settings
from fleet.outside.fits_table import show_fits
from fleet.outside.model_files import HubFiles, ModelFiles, read_folder
from fleet.outside.operator_commands import wide_console
from fleet_client import private_files
from fleet_client.flags import Parser, add_flags
from fleet_client.text_files import read_text
from process.errors import CloudError, ConfigError
from process.own_profiles import FILE_NAME
from vast.cli import Cli
from vast.client import Vast
from vast.rows import Offer

NO_FLAGS = SERVE_ONLY | {"model"}


@dataclass(frozen=True)
class NewProfile:
    """What is asked of `profile add`. model: of the hub, or a folder. name: of the profile, else the model's.

    token_stdin: the hub's token is the first line of standard input. market: show which offers fit.
    """

    model: str
    context: int | None = None
    quantization: str | None = None
    revision: str = ""
    name: str = ""
    token_stdin: bool = False
    market: bool = True

    @classmethod
    def of(cls, args: argparse.Namespace) -> "NewProfile":
        """Return what the parsed command line asks for."""
        return cls(
            args.repository,
            args.context,
            args.quantization,
            args.revision,
            args.name,
            args.token_stdin,
            args.market,
        )


def add_profile(commands: "argparse._SubParsersAction[Parser]", environment: str) -> None:
    """Add the command's parser. environment: beginning of its flags' names there."""
    it = commands.add_parser(
        "profile",
        environment=environment,
        description="Make a profile of a model from its own config.json and safetensors, and show which GPUs "
        "of the market fit. It is written to --profiles, else to ./profiles.toml.",
        epilog="add, the model and the flags up to --no-market are for the command line only.",
        help="make a profile of a model",
    )
    it.add_argument("does", choices=("add",), help="what to do (no default)")
    it.add_argument("repository", metavar="ORG/MODEL", help="a model of the hub, or a folder (no default)")
    it.add_argument("--context", type=int, metavar="N", help="longest request, tokens (default: the model's)")
    it.add_argument("--quantization", metavar="Q", help="quantize while loading: fp8 (default: as it is)")
    it.add_argument("--revision", default="", metavar="R", help="branch, tag or commit (default: main)")
    it.add_argument("--name", default="", metavar="NAME", help="of the profile (default: the model's)")
    it.add_argument(
        "--token-stdin",
        action="store_true",
        help="read the hub's token from standard input (default: HF_TOKEN in the environment)",
    )
    it.add_argument(
        "--no-market",
        dest="market",
        action="store_false",
        help="search for no offers (default: show which fit)",
    )
    add_flags(it, AutoscalerConfig, without=NO_FLAGS)


def profile_command(
    asked: NewProfile,
    config: AutoscalerConfig,
    console: Console | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Make the profile, write it, and show what was found; raise ConfigError where it cannot be made."""
    console = console or wide_console()
    repository, files = _files(asked, environ)
    name = asked.name or profile_name(repository)
    path = config.profiles or Path(FILE_NAME)
    before = _known(path, name)
    facts = read_config(
        files.config,
        repository,
        stored_bytes=files.stored_bytes,
        pooling=files.pooling,
        context=asked.context,
        quantization=asked.quantization,
    )
    entry = make_entry(repository, facts, asked.revision, (files.source,))
    _write(path, before, name, entry)
    profile = entry.profile(name)
    for sentence in _found(name, entry, facts, path):
        console.print(sentence, highlight=False, markup=False)
    if asked.market:
        _show_market(profile, config, console, environ)


def _files(asked: NewProfile, environ: Mapping[str, str]) -> tuple[str, ModelFiles]:
    """Return what the model is called, and its files: of a folder, if there is one of that name."""
    if asked.revision and not WORD.fullmatch(asked.revision):
        raise ConfigError(f"--revision {asked.revision!r:.80}: wanted a branch, tag or commit")
    folder = Path(asked.model).expanduser()
    if folder.is_dir():
        parts = [p for p in folder.resolve().parts[-2:] if p != "/"]
        name = "/".join(parts)
        return (name if REPOSITORY.fullmatch(name) else parts[-1]), read_folder(folder)
    if not REPOSITORY.fullmatch(asked.model):
        raise ConfigError(f"{asked.model!r:.80}: wanted ORG/MODEL of the hub, or a folder")
    token = sys.stdin.readline().strip() if asked.token_stdin else environ.get("HF_TOKEN", "").strip()
    if not token.isascii() or not token.isprintable():
        raise ConfigError("the hub's token: wanted printable ASCII characters")
    return asked.model, HubFiles(token or None, environ).read(asked.model, asked.revision)


def _known(path: Path, name: str) -> str:
    """Return the text of the file as it is; raise ConfigError where it cannot take that name."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name[:80]!r}: wanted 1 to 63 of a-z 0-9 . _ -, first no . _ -")
    if name in PROFILES:
        raise ConfigError(
            f"{name} is a built-in profile: serve it with --model {name}, or give another --name"
        )
    text = read_text(path, "--profiles") if path.exists() else ""
    if name in entries_in(text, str(path)):
        raise ConfigError(f"{path} has a profile {name} already: give another --name, or remove that one")
    return text


def _write(path: Path, before: str, name: str, entry: ProfileEntry) -> None:
    """Append the entry, so that comments and order stay; the file is the old one or the new one."""
    text = f"{before.rstrip()}\n\n{written({name: entry})}".lstrip()
    entries_in(text, str(path))
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e


def _found(name: str, entry: ProfileEntry, facts: ModelFacts, path: Path) -> list[str]:
    shape = facts.shape
    active = f", {shape.active_b:.3g} billion active" if shape.experts else ""
    kept = f"quantized ({facts.quantization})" if facts.quantization else "in 16 bits"
    one_gb = shape.kv_bytes * facts.context / 1e9
    kind = "makes vectors" if facts.pooling else "makes text"
    parser = entry.tool_parser or ("none" if facts.pooling else "unknown, so tools are refused")
    return [
        f"{entry.model}: {facts.kind}, {kind}, {shape.params_b:.3g} billion parameters{active}, {kept}.",
        f"Weights {shape.weights_gb:.1f} GB; KV memory {shape.kv_bytes / 1e3:.0f} kB a token: {one_gb:.1f} GB"
        f" for a request of {facts.context:,} tokens.",
        f"At least {entry.gpu_total_gb:.0f} GB of GPU memory, on {entry.gpus} GPUs at most; disk "
        f"{entry.disk_gb:.0f} GB.",
        f"Tool parser {parser}; reasoning parser {entry.reasoning_parser or 'none'}.",
        f"Written to {path} as [{name}]: serve it with --model {name}.",
    ]


# --- outside world ----------------------------------------------------------------------------------------


def _show_market(
    profile: Profile, config: AutoscalerConfig, console: Console, environ: Mapping[str, str]
) -> None:
    try:
        offers = _offers(profile, config, environ)
    except (CloudError, ConfigError) as e:
        console.print(f"The market is not shown: {e}", highlight=False, markup=False)
        return
    wanted, _ = sorted_out(offers, profile, config.preferences)
    show_fits(fits_of(wanted, profile, Slo()), profile, console)


def _offers(profile: Profile, config: AutoscalerConfig, environ: Mapping[str, str]) -> list[Offer]:
    state_dir = config.state_dir or private_files.default_state_dir(config.label)
    private_files.make_private_dir(state_dir)
    vast = Vast(Cli(vast_settings(config, state_dir, environ, Path.home())))
    return vast.search_offers(config.offer_query(profile), storage_gb=profile.disk_gb)
