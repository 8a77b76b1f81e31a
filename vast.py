"""Vast.ai as typed calls: what is for rent, what we have, and what can be done with it.

Each method is one command of the vastai CLI (`vast_cli` runs it and raises what the run shows) and one
reading of what it printed. A command counts as done only when its own words say so: the JSON that it
prints on success, or for those that ignore `--raw` the exact sentence (vast-contract 2). A listing is
returned whole or not at all: `{}`, or fewer rows than it claims to have, raises.

Every change is sent once: the CLI's own retry would turn a lost reply into a refusal. So RateLimited,
CloudAuthError and the other 4xx mean that nothing was done. After CloudTimeout, TransportError,
ProtocolError or a 5xx it may have been done, and only the listing tells.
"""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from errors import ConfigError
from vast_cli import (
    ACCOUNT,
    CHANGE,
    CREATE,
    DESTROY,
    LISTING,
    LOGS,
    SEARCH,
    SSH_KEYS,
    ApiError,
    Cli,
    CloudAuthError,
    CloudTimeout,
    Endpoint,
    NoSuchInstance,
    OfferGone,
    ProtocolError,
    RateLimited,
    TransportError,
    VastSettings,
    api_error,
    find_api_key,
    in_words,
    short,
    unexpected,
)

__all__ = [
    "ApiError",
    "CloudAuthError",
    "CloudTimeout",
    "NoSuchInstance",
    "Offer",
    "OfferGone",
    "ProtocolError",
    "RateLimited",
    "Row",
    "TransportError",
    "Vast",
    "VastSettings",
    "find_api_key",
]

log = logging.getLogger("vast")

ONCE = "--retry=1"  # attempts in all; the default is 3, also for changes (vast-contract 0, row 9)
ONSTART_LIMIT_BYTES = 16_384  # vast-contract 2.2: the service refuses or cuts longer scripts
LABEL_LIMIT = 256  # at create; vast-contract 2.2
PORTS_LIMIT = 64  # -p options of one instance; vast-contract 2.2
PAGE_ROWS = 25  # the most that one page of the listing holds; vast-contract 2.3
HOURS_PER_MONTH = 720.0  # storage_total_cost = storage_cost * disk_space / 720; vast-contract 2.11


@dataclass(frozen=True)
class Offer:
    """A machine for rent. Prices are $/h, dph_total with the storage asked for; None means not said."""

    id: int
    machine_id: int
    host_id: int | None
    gpu_name: str
    num_gpus: int
    gpu_ram_mb: float
    dph_total: float
    dph_base: float
    storage_cost_gb_month: float
    inet_down_mbps: float
    reliability: float
    dlperf: float | None
    geolocation: str | None
    is_bid: bool
    min_bid: float | None
    duration_s: float | None


@dataclass(frozen=True)
class Row:
    """One instance as the listing shows it. None means not said.

    ports: tcp port in the container -> port at public_ip, empty unless it runs. dph_total: $/h when it
    runs; price_now_usd_h: in its present state. Dates are epoch seconds. onstart holds a master token,
    so repr leaves it out.
    """

    id: int
    machine_id: int
    label: str | None
    actual_status: str | None
    intended_status: str | None
    cur_state: str | None
    status_msg: str | None
    public_ip: str | None
    ports: Mapping[int, int]
    ssh_host: str | None
    ssh_port: int | None
    gpu_name: str
    num_gpus: int
    dph_base: float
    dph_total: float
    storage_usd_h: float
    price_now_usd_h: float
    start_date: float | None
    end_date: float | None
    image: str | None
    onstart: str | None = field(default=None, repr=False)


# --- reading what the CLI printed ------------------------------------------------------------------


class _Fields:
    """Typed reading of one JSON object. A required field that is missing or wrong raises and is named."""

    def __init__(self, command: str, what: str, data: object) -> None:
        self._command = command
        self._what = what
        if not isinstance(data, dict):
            raise unexpected(command, f"an object for each {what}", _shape(data))
        self._data: dict[str, object] = data

    def whole(self, key: str) -> int:
        value = self.maybe_whole(key)
        return self._refuse(key, "a whole number") if value is None else value

    def maybe_whole(self, key: str) -> int | None:
        value = self._data.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def amount(self, key: str) -> float:
        value = self.maybe_amount(key)
        return self._refuse(key, "a number of 0 or more") if value is None else value

    def maybe_amount(self, key: str) -> float | None:
        """A finite number of 0 or more: the service writes -1 where it does not know."""
        value = self.maybe_number(key)
        return value if value is not None and value >= 0 else None

    def maybe_amount_in(self, outer: str, key: str) -> float | None:
        return _Fields(self._command, f"{self._what}.{outer}", self.mapping(outer)).maybe_amount(key)

    def number(self, key: str) -> float:
        value = self.maybe_number(key)
        return self._refuse(key, "a number") if value is None else value

    def maybe_number(self, key: str) -> float | None:
        value = self._data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    def text(self, key: str) -> str:
        return self.maybe_text(key) or self._refuse(key, "a text")

    def maybe_text(self, key: str) -> str | None:
        """Stripped: whitespace has been seen around addresses. None when empty."""
        value = self._data.get(key)
        return (value.strip() or None) if isinstance(value, str) else None

    def rows(self, key: str) -> list[object]:
        value = self._data.get(key)
        return value if isinstance(value, list) else self._refuse(key, "a list")

    def mapping(self, key: str) -> dict[str, object]:
        """Empty when it is missing or null."""
        value = self._data.get(key)
        return value if isinstance(value, dict) else {}

    def flag(self, key: str) -> bool | None:
        value = self._data.get(key)
        return value if isinstance(value, bool) else None

    def _refuse(self, key: str, expected: str) -> NoReturn:
        got = _shape(self._data[key]) if key in self._data else "no such field"
        raise unexpected(self._command, f"{expected} as {key} of the {self._what}", got)


def _shape(value: object) -> str:
    """What kind of JSON it is. Not its content, which may hold keys and start scripts."""
    if isinstance(value, dict):
        return f"an object with {', '.join(sorted(value)) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else f"a {type(value).__name__}"


def _json(command: str, stdout: str) -> object:
    try:
        return json.loads(stdout)
    except ValueError:
        if not stdout.strip():
            got = "nothing"
        elif stdout.lstrip().startswith(("{", "[")):
            got = f"{len(stdout)} characters of broken JSON"
        else:
            got = repr(short(stdout))
        raise unexpected(command, "JSON on stdout", got) from None


def _list(command: str, of: str, stdout: str) -> list[object]:
    value = _json(command, stdout)
    if not isinstance(value, list):
        raise unexpected(command, f"a list of {of}", _shape(value))
    return value


def _offer(f: _Fields) -> Offer:
    return Offer(
        id=f.whole("id"),
        machine_id=f.whole("machine_id"),
        host_id=f.maybe_whole("host_id"),
        gpu_name=f.text("gpu_name"),
        num_gpus=f.whole("num_gpus"),
        gpu_ram_mb=f.amount("gpu_ram"),
        dph_total=f.amount("dph_total"),
        dph_base=f.amount("dph_base"),
        storage_cost_gb_month=f.amount("storage_cost"),
        inet_down_mbps=f.maybe_amount("inet_down") or 0.0,
        reliability=f.maybe_amount("reliability") or f.maybe_amount("reliability2") or 0.0,
        dlperf=f.maybe_amount("dlperf"),
        geolocation=f.maybe_text("geolocation"),
        is_bid=f.flag("is_bid") is True,
        min_bid=f.maybe_amount("min_bid"),
        duration_s=f.maybe_amount("duration"),
    )


def _row(f: _Fields) -> Row:
    dph_total = f.amount("dph_total")
    storage_usd_h = f.maybe_amount("storage_total_cost")
    if storage_usd_h is None:
        gb, usd_gb_month = f.maybe_amount("disk_space"), f.maybe_amount("storage_cost")
        storage_usd_h = (gb or 0.0) * (usd_gb_month or 0.0) / HOURS_PER_MONTH
    dph_base = f.maybe_amount("dph_base")
    cur_state = f.maybe_text("cur_state")
    # cur_state is the contract's: while it is stopped the GPU is given up, and not paid (2.12, 2.13).
    price_now = f.maybe_amount_in("instance", "totalHour")
    if price_now is None:
        price_now = storage_usd_h if cur_state in ("stopped", "unloaded") else dph_total
    return Row(
        id=f.whole("id"),
        machine_id=f.whole("machine_id"),
        label=f.maybe_text("label"),
        actual_status=f.maybe_text("actual_status"),
        intended_status=f.maybe_text("intended_status"),
        cur_state=cur_state,
        status_msg=f.maybe_text("status_msg"),
        public_ip=f.maybe_text("public_ipaddr"),
        ports=_ports(f.mapping("ports")),
        ssh_host=f.maybe_text("ssh_host"),
        ssh_port=f.maybe_whole("ssh_port"),
        gpu_name=f.maybe_text("gpu_name") or "",
        num_gpus=f.maybe_whole("num_gpus") or 1,
        dph_base=max(0.0, dph_total - storage_usd_h) if dph_base is None else dph_base,
        dph_total=dph_total,
        storage_usd_h=storage_usd_h,
        price_now_usd_h=price_now,
        start_date=f.maybe_amount("start_date"),
        end_date=f.maybe_amount("end_date"),
        image=f.maybe_text("image_uuid"),
        onstart=f.maybe_text("onstart"),
    )


def _label_begins(f: _Fields, prefix: str | None) -> bool:
    return prefix is None or (f.maybe_text("label") or "").startswith(prefix)


def _ports(mapped: Mapping[str, object]) -> dict[int, int]:
    """{"8000/tcp": [{"HostPort": "33526"}, …again for IPv6]} as {8000: 33526}; anything else is left out."""
    ports = {}
    for inside, outside in mapped.items():
        port, _, protocol = inside.partition("/")
        first = outside[0] if isinstance(outside, list) and outside else None
        host_port = str(first.get("HostPort")) if isinstance(first, dict) else ""
        if protocol == "tcp" and port.isdecimal() and host_port.isdecimal():
            ports[int(port)] = int(host_port)
    return ports


# --- what is refused before it is sent -------------------------------------------------------------

# What parse_env of the CLI keeps; it drops all else without a word (vast-contract 2.2). Quotes inside a
# value are refused too, because it strips them at the ends.
_ENV_OPTION = re.compile(
    r"""-e\ [A-Za-z_][A-Za-z0-9_]*=(?:[^\s"']*|"[^"'\n]*"|'[^"'\n]*')(?=\ |\Z)
      | -p\ (?P<ports>\d{1,5}:\d{1,5}(?:/tcp|/udp)?)(?=\ |\Z)
      | -h\ [A-Za-z0-9.-]+(?=\ |\Z)
      | -v\ [A-Za-z0-9:./_]+(?=\ |\Z)
      | -n\ [a-z0-9-]+(?=\ |\Z)""",
    re.VERBOSE,
)


def check_env(env: str) -> None:
    """Raise ValueError when the CLI would drop or change a part of it. The message shows no value."""
    at, ports = 0, 0
    while at < len(env):
        option = _ENV_OPTION.match(env, at)
        if option is None:
            raise ValueError(
                f"env, character {at + 1} of {len(env)}: expected -e NAME=VALUE, -p PORT:PORT, -h, -v or -n, "
                "with single spaces between; vastai would drop what is there without a word"
            )
        ports += option["ports"] is not None
        at = option.end() + 1
    if env.endswith(" "):
        raise ValueError("env ends with a space")
    if ports > PORTS_LIMIT:
        raise ValueError(f"env: at most {PORTS_LIMIT} ports, got {ports}")


def _check_label(label: str) -> None:
    """A label is one argument and is found in a sentence afterwards, so it must be plain."""
    if not re.fullmatch(r"[A-Za-z0-9_][!-~]*", label) or len(label) > LABEL_LIMIT:
        raise ValueError(
            f"label {label!r}: expected 1 to {LABEL_LIMIT} printable characters without spaces, "
            "the first a letter, a digit or _"
        )


# --- outside world ---------------------------------------------------------------------------------


class Vast:
    """The account at the cloud. Safe to use from several threads; every method but __init__ runs the CLI."""

    def __init__(
        self,
        settings: VastSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Ask nothing yet. ConfigError when the CLI is missing or has no place for its files."""
        self._settings = settings
        self._cli = Cli(settings, clock=clock, sleep=sleep)

    def search_offers(
        self,
        query: str,
        storage_gb: float,
        order: str = "dph_total",
        limit: int = 64,
        exclude_machines: Collection[int] = (),
    ) -> list[Offer]:
        """What is for rent on demand and fits the query (vast-contract 2.1), in that order.

        dph_total includes storage_gb. An offer that lacks a price or a name is left out; when all do,
        ProtocolError.
        """
        words = ["search", "offers"]
        command = in_words(words)
        if exclude_machines:
            query += f" machine_id notin [{','.join(str(m) for m in sorted(exclude_machines))}]"
        flags = ["--type=on-demand", f"--storage={storage_gb:g}", f"--order={order}", f"--limit={limit}"]
        answer = _list(command, "offers", self._cli.run(SEARCH, words, [query, *flags, "--raw"]))
        offers: list[Offer] = []
        flaw: ProtocolError | None = None
        for data in answer:
            try:
                offers.append(_offer(_Fields(command, "offer", data)))
            except ProtocolError as e:
                flaw = e
        if flaw is not None:
            if not offers:
                raise flaw
            log.warning("%d of %d offers left out: %s", len(answer) - len(offers), len(answer), flaw)
        return [o for o in offers if o.machine_id not in exclude_machines]

    def create(
        self,
        offer_id: int,
        image: str,
        disk_gb: float,
        label: str,
        env: str,
        onstart: str,
        price_usd_h: float | None = None,
    ) -> int:
        """Rent the offer and return the new instance's id. Sent once: after any failure look for the label.

        env: see check_env. onstart: the start script's text. price_usd_h: a bid per machine, which makes
        it interruptible. Raises ValueError before anything is sent, and OfferGone.
        """
        check_env(env)
        _check_label(label)
        size = len(onstart.encode())
        if size > ONSTART_LIMIT_BYTES:
            raise ValueError(f"onstart: at most {ONSTART_LIMIT_BYTES} bytes, got {size}")
        words = ["create", "instance", str(offer_id)]
        command = in_words(words)
        flags = [f"--image={image}", f"--disk={disk_gb:g}", f"--label={label}", f"--env={env}"]
        # Without --cancel-unavail a lost race leaves a stopped instance that bills (vast-contract 2.2).
        flags += ["--ssh", "--direct", "--cancel-unavail", "--raw", ONCE]
        if price_usd_h is not None:
            flags.append(f"--bid_price={price_usd_h:g}")
        printed = self._cli.run(CREATE, words, flags, script=onstart)
        answer = _Fields(command, "answer", _json(command, printed))
        if answer.flag("success") is False:
            msg = answer.maybe_text("msg") or answer.maybe_text("error") or "no message"
            raise api_error(command, CREATE, 200, msg)
        return answer.whole("new_contract")

    def list_instances(self, label_prefix: str | None = None) -> list[Row]:
        """Every instance of the account, or those whose label begins so; all of them or CloudError.

        The labels are compared here: a filter at the service would hide a row that it misreads, and its
        silence would look like an instance that is gone.
        """
        words = ["show", "instances"]
        command = in_words(words)
        page, total, more = self._first_page(words)
        if more:
            # The interval of this endpoint is 1 s and the CLI pauses only before a retry: with 6 attempts
            # these pauses add up to 2 s, so that the second page and the next outlast it.
            limit_s = self._settings.listing_timeout_s
            printed = self._cli.run(LISTING, words, ["--raw", "--retry=6"], timeout_s=limit_s)
            page = _list(command, "instances", printed)
            if len(page) < total:
                _, total, _ = self._first_page(words)  # one may have been destroyed between the two
        listed = {f.whole("id"): f for f in (_Fields(command, "instance", data) for data in page)}
        if len(listed) < total:
            raise unexpected(command, f"the {total} instances that it claims", f"{len(listed)}")
        return [_row(f) for f in listed.values() if _label_begins(f, label_prefix)]

    def _first_page(self, words: list[str]) -> tuple[list[object], int, bool]:
        """Its rows, how many there are in all, and whether there are more pages.

        With --limit the CLI shows the service's own envelope. Without, an outage that answers `{}` prints
        `[]`, which looks like an account without instances (vast-contract 1.1).
        """
        command = in_words(words)
        printed = self._cli.run(LISTING, words, ["--raw", f"--limit={PAGE_ROWS}"])
        f = _Fields(command, "listing", _json(command, printed))
        if f.flag("success") is False:
            raise unexpected(command, "success", f"success: false {short(f.maybe_text('msg') or '')!r}")
        rows = f.rows("instances")
        on_page = f.maybe_whole("instances_found")
        if on_page is not None and len(rows) < on_page:
            raise unexpected(command, f"the {on_page} rows that the page claims", f"{len(rows)}")
        return rows, f.whole("total_instances"), f.maybe_text("next_token") is not None

    def start(self, instance_id: int) -> None:
        """Ask for a stopped instance to run. It may wait for its GPU for ever: the listing tells."""
        self._say(CHANGE, ["start", "instance", str(instance_id)], f"starting instance {instance_id}.")

    def stop(self, instance_id: int) -> None:
        """Ask for it to stop; its disk stays and is paid for."""
        self._say(CHANGE, ["stop", "instance", str(instance_id)], f"stopping instance {instance_id}.")

    def label(self, instance_id: int, label: str) -> None:
        """Its label is that one."""
        _check_label(label)
        words = ["label", "instance", str(instance_id)]
        self._say(CHANGE, words, f"label for {instance_id} set to {label}.", [label])

    def destroy(self, instance_id: int) -> None:
        """Ask for its end, data included; fine when it is gone already. Only the listing proves it.

        Plain, because with --raw nothing is printed whatever happened; -y, because without it nothing is
        destroyed and the exit status is 0 (vast-contract 0, rows 3 and 4).
        """
        words = ["destroy", "instance", str(instance_id)]
        try:
            self._say(DESTROY, words, f"destroying instance {instance_id}.", ["-y"], raw=False)
        except NoSuchInstance:
            log.debug("instance %d was gone before it was destroyed", instance_id)

    def _say(
        self,
        endpoint: Endpoint,
        words: list[str],
        sentence: str,
        flags: Collection[str] = (),
        *,
        raw: bool = True,
    ) -> None:
        """Run a command that prints exactly that sentence when it is done. raw: its errors are JSON."""
        stdout = self._cli.run(endpoint, words, [*flags, ONCE, *(["--raw"] if raw else [])])
        if stdout.strip() != sentence:
            got = repr(short(stdout)) if stdout.strip() else "nothing"
            raise unexpected(in_words(words), repr(sentence), got)

    def logs(self, instance_id: int, tail: int = 100) -> str:
        """The last lines of the container's log. Takes 1 to 10 s; CloudTimeout when it never came."""
        words = ["logs", str(instance_id)]
        flags = [f"--tail={tail}", "--raw"]
        stdout = self._cli.run(LOGS, words, flags, timeout_s=self._settings.logs_timeout_s)
        if not stdout:
            raise unexpected(in_words(words), "a log, or at least an empty line", "nothing")
        return stdout.removesuffix("\n")

    def credit(self) -> float:
        """Dollars left to spend; at 0 and below the service stops everything."""
        words = ["show", "user"]
        answer = _json(in_words(words), self._cli.run(ACCOUNT, words, ["--raw"]))
        return _Fields(in_words(words), "account", answer).number("credit")

    def check_key(self) -> None:
        """The key is good, or ConfigError: for start-up. CloudError when that cannot be known now."""
        try:
            self.credit()
        except CloudAuthError as e:
            raise ConfigError(f"the cloud refuses the API key: {e}") from e

    def register_ssh_key(self, public_key: str) -> None:
        """The account has this key, and gives it to instances created from now on. Harmless when repeated."""
        parts = public_key.split()
        if len(parts) < 2 or not parts[0].startswith(("ssh-", "ecdsa-", "sk-")) or "\n" in public_key.strip():
            raise ValueError("expected one line of an ssh public key: TYPE BASE64 COMMENT")
        words = ["show", "ssh-keys"]
        for data in _list(in_words(words), "keys", self._cli.run(SSH_KEYS, words, ["--raw"])):
            f = _Fields(in_words(words), "key", data)
            # Documented as `key` in the listing and as `public_key` in the answer to a create.
            known = (f.maybe_text("key") or f.maybe_text("public_key") or "").split()
            if known[:2] == parts[:2] and f.maybe_text("deleted_at") is None:
                return
        words = ["create", "ssh-key"]
        # Never without the argument: it would replace the user's own key (vast-contract 2.9).
        stdout = self._cli.run(SSH_KEYS, words, [" ".join(parts), ONCE])
        if not re.search(r"^ssh-key created .*'success': True", stdout, re.MULTILINE):
            raise unexpected(in_words(words), "'ssh-key created … success'", repr(short(stdout)))
