"""Reads and writes files of profiles: TOML, one table each, as engine/models.toml.

    [qwen3-8b]
    model = "Qwen/Qwen3-8B"
    image = { name = "vllm/vllm-openai:v0.11.0", cuda = "12.8" }
    context = 32768
    gpus = 1
    …

docs/models.md says what each field means; engine/profile_entry.py derives of them the filters of the search,
vLLM's arguments, and times to load and to start where none are given.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import msgspec
import tomli_w

from engine.profile import Profile
from engine.profile_entry import NAME, ProfileEntry
from process.errors import ConfigError


def entries_in(text: str, what: str) -> dict[str, ProfileEntry]:
    """Return the entries of a TOML text by name; raise ConfigError, which begins with `what`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{what}: no TOML: {e}") from None
    return {name: _entry(name, table, what) for name, table in tables.items()}


def profiles_in(text: str, what: str) -> dict[str, Profile]:
    """Return the profiles that a TOML text describes; raise ConfigError, which begins with `what`."""
    return {name: entry.profile(name) for name, entry in entries_in(text, what).items()}


def written(entries: Mapping[str, ProfileEntry]) -> str:
    """Return the entries as TOML; what has its default is left out."""
    return tomli_w.dumps({name: _plain(entry) for name, entry in entries.items()})


def _plain(entry: ProfileEntry) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(entry)
    usual = {f.name: f.default for f in fields(entry) if f.default is not MISSING}
    usual |= {f.name: f.default_factory() for f in fields(entry) if f.default_factory is not MISSING}
    return {name: value for name, value in data.items() if name not in usual or value != usual[name]}


def _entry(name: str, table: Any, what: str) -> ProfileEntry:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{what}: [{name[:80]}]: wanted 1 to 63 of a-z 0-9 . _ -, first no . _ -")
    known = {f.name for f in fields(ProfileEntry)}
    if isinstance(table, dict) and (odd := sorted(table.keys() - known)):
        raise ConfigError(f"{what}: [{name}]: unknown field {odd[0]!r:.80}")
    try:
        return msgspec.convert(table, ProfileEntry)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{what}: [{name}]: {e}") from None
