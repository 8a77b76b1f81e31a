"""Command lines: flags as fields of a settings dataclass, and errors of one line.

    @dataclass(frozen=True)
    class GatewayConfig:
        port: int = flag(8300, "port to listen on", least=1, most=65535)      --port N

A flag is declared once: name, type, default, meaning, unit and range. `add_flags` gives it to a parser, which
takes its value from the first of these that has one, and leaves it out where none has (the dataclass knows
the default):

    command line         --port 8301
    environment          FLEET_GATEWAY_PORT=8301
    file of --config     port = 8301
    default              8300

`check_flags` looks at the values of a settings object. A wrong name or value is a ConfigError that says where
it was given. docs/flags.md is made of the declarations, by `make flags`.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from fleet_client.errors import ConfigError
from fleet_client.flag_sources import read_environment, read_file
from fleet_client.private_files import check_private

METAVARS: dict[type | str, str] = {int: "N", float: "X", Path: "FILE", "s": "S"}
"""Stand-ins for a flag's value in --help, by type; "s": of a field in seconds, whose name ends in _s."""

SWITCH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
"""What may be said of a switch in the environment, in small letters."""

LONGEST_SHOWN = 80
"""Most characters of a wrong value that an error repeats."""


def flag(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    unit: str | None = None,
    shown: str | None = None,
    read: Callable[[str], Any] | None = None,
    secret: Callable[[str], bool] | None = None,
) -> Any:
    """Declare a field of a settings dataclass that is also a command-line flag.

    meaning: its text in --help. least, most: the allowed range. unit: of a number; that of a name which ends
    in _s is seconds. shown: the default in words, where the value itself says little. read: makes the value
    of a text, or raises ValueError or ConfigError, whose text then says what was wanted. secret: says whether
    a value holds a secret: then it is refused on the command line, which others can read, and in a file that
    they can; no text shows it.
    """
    declared = {
        "meaning": meaning,
        "bounds": None if least is None or most is None else (least, most),
        "choices": choices,
        "metavar": metavar,
        "unit": unit,
        "shown": shown,
        "read": read,
        "secret": secret,
    }
    return dataclasses.field(default=default, metadata={"flag": declared}, repr=secret is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """The declaration of one flag. many: it may be repeated; kind is then the type of one value."""

    name: str
    kind: type[Any]
    default: Any
    many: bool
    meaning: str
    bounds: tuple[float, float] | None
    choices: Sequence[str] | None
    metavar: str | None
    unit: str | None
    shown: str | None
    read: Callable[[str], Any] | None
    secret: Callable[[str], bool] | None

    @property
    def option(self) -> str:
        """The flag's name on the command line, as --max-tries."""
        return flag_of(self.name)

    @property
    def key(self) -> str:
        """The flag's name in a file, as max-tries."""
        return self.name.replace("_", "-")

    def from_text(self, before: str, text: str) -> Any:
        """Return the flag's value in a text, several with spaces between; errors begin with `before`."""
        if self.many:
            return tuple(self.one_value(before, part) for part in text.split())
        return self.one_value(before, text)

    def from_toml(self, before: str, value: Any) -> Any:
        """Return the flag's value, given in a TOML file; raise ConfigError if it is wrong."""
        if self.many and isinstance(value, list):
            return tuple(self._from_toml(before, one) for one in value)
        found = self._from_toml(before, value)
        return (found,) if self.many else found

    def _from_toml(self, before: str, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = isinstance(value, str) and self.kind not in (bool, int, float)
        if text or (self.read is not None and (number or isinstance(value, str))):
            return self.one_value(before, str(value))
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.kind is int and number and isinstance(value, int):
            return self.checked(before, value)
        if self.kind is float and number:
            return self.checked(before, float(value))
        raise ConfigError(f"{before}{_shown(value)}: wanted {self._wanted}")

    def one_value(self, before: str, text: str) -> Any:
        """Return one value of the flag, given as text; raise ConfigError, which begins with `before`."""
        try:
            if self.read is not None:
                return self.read(text)
            if self.kind is bool:
                return SWITCH[text.strip().lower()]
            value = Path(text).expanduser() if self.kind is Path else self.kind(text)
        except ConfigError as e:
            raise ConfigError(f"{before}{_shown(text)}: {e}") from None
        except (ValueError, KeyError, RuntimeError):  # RuntimeError: ~ of somebody who is not there
            raise ConfigError(f"{before}{_shown(text)}: wanted {self._wanted}") from None
        return self.checked(before, value)

    def from_command_line(self, text: str) -> Any:
        """Return one value of the flag from the command line; raise ConfigError for one that is a secret."""
        if self.secret is not None and self.secret(text):
            raise ConfigError(
                f"{self.option}: others can read a command line, and this one may hold a secret: it belongs "
                f"into the environment or a file of mode 0600"
            )
        return self.one_value(f"{self.option} ", text)

    def check_file(self, path: Path, value: Any) -> None:
        """Raise ConfigError where the value from a file is a secret, and others can read the file."""
        if self.secret is not None and any(map(self.secret, value if self.many else (value,))):
            check_private(path, f"{self.key} is in the file of --config:")

    @property
    def _wanted(self) -> str:
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        kinds = {bool: "true or false", int: "a whole number", float: "a number", Path: "the path of a file"}
        return kinds.get(self.kind, "a text")

    def checked(self, before: str, value: Any) -> Any:
        """Return a value of the flag; raise ConfigError when it is out of range or none of the choices."""
        if self.bounds and not self.bounds[0] <= value <= self.bounds[1]:  # not a number is in no range
            raise ConfigError(f"{before}{value:g}: wanted {self.bounds[0]:g} to {self.bounds[1]:g}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{before}{_shown(value)}: wanted {self._wanted}")
        return value

    @property
    def unit_shown(self) -> str:
        """The unit of the flag's value, "" for none."""
        return self.unit or ("s" if self.name.endswith("_s") else "")

    @property
    def bounds_shown(self) -> str:
        """The flag's range or choices in words, "" without any."""
        if self.choices:
            return ", ".join(self.choices)
        return " to ".join(map(_number, self.bounds)) if self.bounds else ""

    @property
    def default_shown(self) -> str:
        """The flag's default in words."""
        if self.shown is not None:
            return self.shown
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return " ".join(map(str, self.default)) or "none"
        if isinstance(self.default, int | float):
            return _number(self.default)
        return "none" if self.default is None else str(self.default)

    @property
    def stand_in(self) -> str | None:
        """The word that stands for the flag's value in --help; None for a switch."""
        if self.kind is bool:
            return None
        if self.choices:
            return "|".join(self.choices)
        return self.metavar or METAVARS.get("s" if self.name.endswith("_s") else self.kind, "TEXT")

    def help(self) -> str:
        """Return the flag's text in --help."""
        said = "; ".join(
            filter(None, ("" if self.choices else self.bounds_shown, f"default {self.default_shown}"))
        )
        return f"{self.meaning} ({said})".replace("%", "%%")


def flag_of(name: str) -> str:
    """Return the flag's name on the command line, given the name of its field."""
    return f"--{name.replace('_', '-')}"


def flags_in(settings: type[Any]) -> Iterator[Flag]:
    """Yield the flags of a settings class: those of its fields that are declared with `flag`."""
    types = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if "flag" in field.metadata:
            hint = types[field.name]
            kind = next((one for one in get_args(hint) if one is not type(None)), hint)
            declared = field.metadata["flag"]
            many = get_origin(hint) is tuple and declared["read"] is None
            yield Flag(name=field.name, kind=kind, default=field.default, many=many, **declared)


def check_flags(settings: Any) -> None:
    """Raise ConfigError for the first field of a settings object that is out of range or no choice."""
    for one in flags_in(type(settings)):
        value = getattr(settings, one.name)
        if value is not None and not one.many:
            one.checked(f"{one.option} ", value)


def add_flags(parser: "Parser", settings: type[Any], without: Collection[str] = ()) -> None:
    """Add to a parser the flags of a settings class: its fields that are declared with `flag`.

    A field of type bool is a switch: --name where the default is False, else --name and --no-name. One that
    is a tuple of texts may be repeated. without: fields that get no flag, because they belong to another
    command; they may still be in the file.
    """
    for one in flags_in(settings):
        if one.name in without:
            parser.passed_over.add(one.name)
            continue
        parser.flags[one.name] = one
        if one.kind is bool:
            action: Any = "store_true" if one.default is False else argparse.BooleanOptionalAction
            parser.add_argument(one.option, action=action, default=argparse.SUPPRESS, help=one.help())
            continue
        parser.add_argument(
            one.option,
            action=_Repeated if one.many else "store",
            type=one.from_command_line,
            default=argparse.SUPPRESS,
            metavar=one.stand_in,
            help=one.help(),
        )


class _Repeated(argparse.Action):
    """An argparse action that collects the values of a repeated flag in a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Add one value to the tuple."""
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), values))


class Parser(argparse.ArgumentParser):
    """A parser of flags that raises ConfigError for a wrong one, so that the error is one line.

    With an environment prefix, such as "AUTOSCALER_", it takes the flags of `add_flags` from variables, too,
    and from the file that --config names. What it returns has only what was given somewhere.
    """

    def __init__(self, *, environment: str = "", **more: Any) -> None:
        """Make a parser without flags. environment: the prefix of variables; more: argparse's arguments."""
        self.environment = environment
        self.flags: dict[str, Flag] = {}
        self.passed_over: set[str] = set()
        if environment:
            more.setdefault("usage", "%(prog)s [flags]")
        super().__init__(**more)
        if environment:
            self.add_argument(
                "--config",
                type=Path,
                metavar="FILE",
                default=argparse.SUPPRESS,
                help="take flags from this TOML file, too, as port = 8000; each may also be in the "
                f"environment, as {environment}PORT; command line goes before environment before file "
                f"(default {environment}CONFIG, else none)",
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command line, and add what environment and file say besides."""
        found, rest = super().parse_known_args(args, namespace)
        if self.environment:
            said = read_environment(self.environment, self.flags, os.environ)
            path: Any = found.__dict__.pop("config", None) or os.environ.get(f"{self.environment}CONFIG")
            if path:
                of_file = read_file(Path(path), self.flags, self.passed_over)
                for name, value in of_file.items():
                    self.flags[name].check_file(Path(path), value)
                said = of_file | said
            for name, value in said.items():
                if not hasattr(found, name):
                    setattr(found, name, value)
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message."""
        raise ConfigError(f"{message} (--help lists the flags)")


def within(flag: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError, which names the flag, unless its value is in the range."""
    if not least <= value <= most:
        raise ConfigError(f"{flag} {value:g}: wanted {least:g} to {most:g}")


def server_url(flag: str, text: str) -> str:
    """Return a flag's URL without a slash at its end; raise ConfigError unless it is http(s)://HOST:PORT."""
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not url.username
    except ValueError:
        good = False
    if not good or url.path.strip("/") or url.query or url.fragment:
        raise ConfigError(f"{flag} {text!r}: wanted http://HOST:PORT")
    return text.rstrip("/")


def _number(value: float) -> str:
    return str(int(value)) if value == value // 1 and abs(value) < 1e15 else f"{value:g}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if text.isprintable() and 0 < len(text) <= LONGEST_SHOWN else repr(text[:LONGEST_SHOWN])


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run the main function of a process and exit: ConfigError is one line and exit 2, Ctrl-C is quiet."""
    try:
        main()
    except ConfigError as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0)
