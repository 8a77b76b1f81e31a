"""What the commands have in common: wrong flags are one line, wrong values name flag and range, exit 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from fleet_client.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """One line about a wrong flag, as about everything else that an operator gets wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message} (--help lists the flags)")


def within(flag: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError unless the value is in the range; not a number is not."""
    if not least <= value <= most:
        raise ConfigError(f"{flag} {value:g}: wanted {least:g} to {most:g}")


def server_url(flag: str, text: str) -> str:
    """The URL without a slash at its end; raises ConfigError unless it is http://HOST:PORT or https."""
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if not good or url.path.strip("/") or url.query or url.fragment:
        raise ConfigError(f"{flag} {text!r}: wanted http://HOST:PORT")
    return text.rstrip("/")


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a process's main: ConfigError is one line and exit 2, Ctrl-C is quiet."""
    try:
        main()
    except ConfigError as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0)
