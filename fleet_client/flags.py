"""Command lines: flags as fields of a settings dataclass, and errors of one line.

    @dataclass(frozen=True)
    class GatewayConfig:
        port: int = flag(8300, "port to listen on", least=1, most=65535)      --port N

A flag is declared once: name, type, default, meaning and range. `add_flags` gives it to a parser and
`check_flags` looks at the values; a wrong flag or value is a ConfigError that names it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from fleet_client.errors import ConfigError

METAVARS: dict[type | str, str] = {int: "N", float: "X", Path: "FILE", "s": "S"}
"""Stand-ins for a flag's value in --help, by type; "s": of a field in seconds, whose name ends in _s."""


def flag(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a field that is a flag, too. meaning: with the unit; least, most: the allowed range."""
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "range": None if least is None or most is None else (least, most),
            "choices": choices,
            "metavar": metavar,
        },
    )


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser, settings: type[Any], without: Collection[str] = ()) -> None:
    """Add a flag for each field of a settings class that is declared with `flag`, but for those without.

    A field of type bool is a switch: --name where the default is False, else --name and --no-name. One that
    is a tuple of texts may be repeated.
    """
    types = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if "meaning" not in field.metadata or field.name in without:
            continue
        meaning, choices = field.metadata["meaning"], field.metadata["choices"]
        kind = next((one for one in get_args(types[field.name]) if one is not type(None)), types[field.name])
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(flag_of(field.name), action=action, default=field.default, help=meaning)
            continue
        default: Any = field.default
        many = get_origin(types[field.name]) is tuple
        if many:
            default = ", ".join(default) or None
        shown = "" if default is None else f" (default {default:{'g' if kind is float else ''}})"
        metavar = field.metadata["metavar"] or METAVARS.get("s" if field.name.endswith("_s") else kind)
        parser.add_argument(
            flag_of(field.name),
            action=_Repeated if many else "store",
            type=kind,
            default=field.default,
            choices=choices,
            metavar=None if choices else metavar,
            help=meaning + shown,
        )


class _Repeated(argparse.Action):
    """Collects the values of a flag in a tuple, in place of the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Add one value."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), values))


def check_flags(settings: Any) -> None:
    """Raise ConfigError for the first field outside its range, or that is none of its choices."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), flag_of(field.name)
        choices = field.metadata.get("choices")
        if field.metadata.get("range"):
            within(name, value, *field.metadata["range"])
        if choices and value not in choices:
            raise ConfigError(f"{name} {value}: wanted {', '.join(choices[:-1])} or {choices[-1]}")


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for a wrong flag, so that it is one line like every other operator's error."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message} (--help lists the flags)")


def within(flag: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError unless the value is in the range; not a number is not."""
    if not least <= value <= most:
        raise ConfigError(f"{flag} {value:g}: wanted {least:g} to {most:g}")


def server_url(flag: str, text: str) -> str:
    """Return the URL without a slash at its end; raise ConfigError unless it is http(s)://HOST:PORT."""
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not url.username
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
