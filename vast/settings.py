"""Which Vast.ai service, real or local, the vastai command calls, and with which key."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fleet_client.loopback import is_loopback_url
from fleet_client.text_files import read_text, said_in
from process.errors import ConfigError

KEY = re.compile("[!-~]+")
"""The key of an account: it goes into a header and an argument."""

KEY_FILE = "the Vast.ai key file"
"""What `vastai set api-key` writes, in errors."""


@dataclass(frozen=True, kw_only=True)
class VastSettings:
    """Which service the vastai command calls, with which key, and how long it may take.

    url: None is the paid production service. local: a local cloud, which must have a loopback url. speedup:
    how much faster than real a local cloud runs; the intervals between calls are divided by it. state_dir:
    the CLI's own files live below it, apart from the user's. timeout_s: the most that one run takes, unless
    its caller says otherwise, start-up of 0.5 s included (vast-contract 3).
    """

    state_dir: Path
    api_key: str = field(repr=False)
    url: str | None = None
    local: bool = False
    speedup: float = 1.0
    executable: Sequence[str] = field(default_factory=lambda: [str(Path(sys.executable).with_name("vastai"))])
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        """Raise ConfigError for settings that would call the wrong service, or the right one wrongly."""
        if not KEY.fullmatch(self.api_key):
            raise ConfigError("the cloud's API key must be printable characters without spaces")
        if self.url is not None:
            _check_url(self.url)
        if self.local and (self.url is None or not is_loopback_url(self.url)):
            raise ConfigError(
                f"a local cloud needs a loopback VAST_URL such as http://127.0.0.1:8500, got {self.url!r}: "
                "without one the CLI talks to the paid service"
            )
        if not (math.isfinite(self.speedup) and self.speedup >= 1):
            raise ConfigError(f"speedup must be 1 or more, got {self.speedup}")
        if self.speedup != 1 and not self.local:
            raise ConfigError(f"speedup {self.speedup} is for a local cloud only")


def _check_url(url: str) -> None:
    """Raise ConfigError for a service URL with a path or slash at its end, or with plain http.

    With a slash the CLI would ask for //api. Plain http is allowed for a loopback address.
    """
    try:
        parts = urlsplit(url)
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        port_is_sound = False
    if not port_is_sound or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"VAST_URL must be like https://host or http://127.0.0.1:PORT, got {url!r}")
    if parts.username or parts.path or parts.query or parts.fragment:
        raise ConfigError(f"VAST_URL must end after host and port, without a slash, got {url!r}")
    if parts.scheme == "http" and not is_loopback_url(url):
        raise ConfigError(f"VAST_URL {url!r} would send the API key unencrypted: use https")


def find_api_key(environ: Mapping[str, str], home: Path) -> str:
    """Return the Vast.ai API key: VAST_API_KEY, else what `vastai set api-key` wrote; else ConfigError."""
    if key := environ.get("VAST_API_KEY", "").strip():
        return key
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    for path in (config / "vastai" / "vast_api_key", home / ".vast_api_key"):
        keys = list(said_in(read_text(path, KEY_FILE))) if path.exists() else []
        for number, key in keys:
            if not KEY.fullmatch(key):
                wrong = "wanted one key of printable ASCII characters, without spaces"
                raise ConfigError(f"{KEY_FILE} {path}, line {number}: {wrong}")
        if len(keys) > 1:
            raise ConfigError(f"{KEY_FILE} {path}: wanted one key, got {len(keys)}")
        if keys:
            return keys[0][1]
    raise ConfigError(
        "no Vast.ai API key: run `vastai set api-key KEY` or set VAST_API_KEY "
        "(keys are made at https://console.vast.ai/manage-keys/)"
    )
