"""The rows of Vast.ai's JSON as typed values: offers and instances."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from process.safe_text import safe_text
from vast.errors import short, unexpected

T = TypeVar("T")

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,254}")

PAGE_ROWS = 25  # the most that one page of the listing holds; vast-contract 2.3
MAX_WHOLE = 2**53
"""The largest whole number that is believed: ids and ports are far below, and JSON and SQLite hold it."""

MAX_NUMBER = 1e15
"""The largest number that is believed, in any unit: dates are seconds."""

MAX_USD_H = 10_000.0
"""The highest price that is believed, $/h, and $ per GB and month: a hundred times the dearest machine."""

MAX_GPUS = 1_024
"""The most GPUs of one machine that are believed."""

MAX_PORT = 65_535

HOSTING_DATACENTER = 1
"""`hosting_type` of a host in a datacenter (so does vastai 1.9.1 read it)."""

PRICE = f"a price from 0 to {MAX_USD_H:,.0f}"

MAX_TEXT = 1_000
"""Characters of a text that are kept: status messages are the longest, and their beginning says all."""

HOURS_PER_MONTH = 720.0  # storage_total_cost = storage_cost * disk_space / 720; vast-contract 2.11


@dataclass(frozen=True)
class Offer:
    """A machine for rent, as a search lists it. Prices are $/h; None means that the service does not say.

    dph_total includes the storage that the search asked for. gpu_mem_bw_gb_s: of one GPU; total_tflops: of
    all of them, at fp32.
    """

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
    inet_down_usd_gb: float | None = None
    driver_version: str | None = None
    verified: bool | None = None
    datacenter: bool | None = None
    gpu_mem_bw_gb_s: float | None = None
    total_tflops: float | None = None
    inet_up_usd_gb: float | None = None


@dataclass(frozen=True)
class Row:
    """One instance as the listing shows it; None means that the listing does not say.

    ports: tcp port in the container -> port at public_ip, empty unless it runs. dph_total: $/h when it runs;
    price_now_usd_h: in its present state; both 0 unless it is priced. Dates are epoch seconds. onstart holds
    a master token, so repr leaves it out. odd: what is missing in it that every row should have. up_s: the
    age of its container.
    """

    id: int
    machine_id: int | None
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
    priced: bool = True
    odd: str | None = None
    up_s: float | None = None
    host_id: int | None = None
    gpu_ram_mb: float | None = None
    gpu_mem_bw_gb_s: float | None = None
    total_tflops: float | None = None
    inet_down_usd_gb: float | None = None
    inet_up_usd_gb: float | None = None


@dataclass(frozen=True)
class Charges:
    """What the account was charged for one instance within a window, in dollars."""

    instance: int
    label: str | None
    gpu: float
    storage: float
    traffic: float
    total: float


@dataclass(frozen=True)
class PriceIncrease:
    """A higher price that a host asks for from the end of an instance's contract on, $/h.

    end_at, new_end_at: of the contract as it is, and where the price is accepted; epoch seconds.
    """

    number: int
    instance: int
    old_usd_h: float
    new_usd_h: float
    end_at: float | None
    new_end_at: float | None


# --- reading what the CLI printed ------------------------------------------------------------------


class Fields:
    """Typed reading of one JSON object from the service.

    A required field that is missing or of another type raises a ProtocolError that names it.
    """

    def __init__(self, command: str, what: str, data: object) -> None:
        self._command = command
        self._what = what
        if not isinstance(data, dict):
            raise unexpected(command, f"an object for each {what}", _shape(data))
        self._data: dict[str, object] = data

    def whole_from(self, key: str, least: int, most: int = MAX_WHOLE) -> int | None:
        """Return the whole number if it is in that range."""
        value = self.maybe_whole(key)
        return value if value is not None and least <= value <= most else None

    def required(self, key: str, expected: str, value: T | None) -> T:
        """Return the value of that key as it was read; raise where it is none."""
        return self._refuse(key, expected) if value is None else value

    def price(self, key: str) -> float | None:
        """Return a price, or None where there is none that can be."""
        value = self.maybe_amount(key)
        return value if value is not None and value <= MAX_USD_H else None

    def host(self, key: str) -> str | None:
        """Return an address or name of a computer: it becomes part of URLs."""
        value = self.maybe_text(key)
        return value if value is not None and _HOST.fullmatch(value) else None

    def whole(self, key: str) -> int:
        value = self.maybe_whole(key)
        return self._refuse(key, "a whole number") if value is None else value

    def maybe_whole(self, key: str) -> int | None:
        value = self._data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_WHOLE:
            return None
        return value

    def amount(self, key: str) -> float:
        value = self.maybe_amount(key)
        return self._refuse(key, "a number of 0 or more") if value is None else value

    def maybe_amount(self, key: str) -> float | None:
        """Return that field as a finite number of 0 or more, else None.

        The service writes -1 where it does not know.
        """
        value = self.maybe_number(key)
        return value if value is not None and value >= 0 else None

    def price_in(self, outer: str, key: str) -> float | None:
        return Fields(self._command, f"{self._what}.{outer}", self.mapping(outer)).price(key)

    def number(self, key: str) -> float:
        value = self.maybe_number(key)
        return self._refuse(key, "a number") if value is None else value

    def maybe_number(self, key: str) -> float | None:
        value = self._data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            return None  # NaN is not, either
        return float(value)

    def text(self, key: str) -> str:
        return self.maybe_text(key) or self._refuse(key, "a text")

    def maybe_text(self, key: str) -> str | None:
        """Return that field's text, made safe and stripped of spaces around it; None when it is empty."""
        value = self._data.get(key)
        return (safe_text(value, MAX_TEXT).strip() or None) if isinstance(value, str) else None

    def script(self, key: str) -> str | None:
        """Return that field's text of many lines unchanged; None when it is empty or no text."""
        value = self._data.get(key)
        return value if isinstance(value, str) and value.strip() else None

    def rows(self, key: str) -> list[object]:
        value = self._data.get(key)
        return value if isinstance(value, list) else self._refuse(key, "a list")

    def mapping(self, key: str) -> dict[str, object]:
        """Return that field's JSON object; an empty one when it is missing or null."""
        value = self._data.get(key)
        return value if isinstance(value, dict) else {}

    def inner(self, what: str, data: object) -> "Fields":
        """Return the reading of an object inside this one."""
        return Fields(self._command, f"{self._what}.{what}", data)

    def is_null(self, key: str) -> bool:
        """Return whether the JSON object has that field with the value null."""
        return key in self._data and self._data[key] is None

    def flag(self, key: str) -> bool | None:
        value = self._data.get(key)
        return value if isinstance(value, bool) else None

    def _refuse(self, key: str, expected: str) -> NoReturn:
        got = _shape(self._data[key]) if key in self._data else "no such field"
        raise unexpected(self._command, f"{expected} as {key} of the {self._what}", got)


def _shape(value: object) -> str:
    """Return what kind of JSON value this is, without its content, which may hold keys and start scripts."""
    if isinstance(value, dict):
        return f"an object with {', '.join(sorted(value)) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else f"a {type(value).__name__}"


def parse_json(command: str, stdout: str) -> object:
    """Return the JSON value that a command printed; raise ProtocolError when it printed something else."""
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


def parse_list(command: str, of: str, stdout: str) -> list[object]:
    """Return the JSON list that a command printed; raise ProtocolError when it printed something else."""
    value = parse_json(command, stdout)
    if not isinstance(value, list):
        raise unexpected(command, f"a list of {of}", _shape(value))
    return value


def offer_of(f: Fields) -> Offer:
    """Return an offer read from its JSON object; raise ProtocolError when a price or a name is missing."""
    return Offer(
        id=f.whole("id"),
        machine_id=f.whole("machine_id"),
        host_id=f.maybe_whole("host_id"),
        gpu_name=f.text("gpu_name"),
        num_gpus=f.required("num_gpus", f"1 to {MAX_GPUS}", f.whole_from("num_gpus", 1, MAX_GPUS)),
        gpu_ram_mb=f.amount("gpu_ram"),
        dph_total=f.required("dph_total", PRICE, f.price("dph_total")),
        dph_base=f.required("dph_base", PRICE, f.price("dph_base")),
        storage_cost_gb_month=f.required("storage_cost", PRICE, f.price("storage_cost")),
        inet_down_mbps=f.maybe_amount("inet_down") or 0.0,
        reliability=f.maybe_amount("reliability") or f.maybe_amount("reliability2") or 0.0,
        dlperf=f.maybe_amount("dlperf"),
        geolocation=f.maybe_text("geolocation"),
        is_bid=f.flag("is_bid") is True,
        min_bid=f.price("min_bid"),
        duration_s=f.maybe_amount("duration"),
        inet_down_usd_gb=f.price("inet_down_cost"),
        inet_up_usd_gb=f.price("inet_up_cost"),
        driver_version=f.maybe_text("driver_version"),
        verified=None if (said := f.maybe_text("verification")) is None else said == "verified",
        datacenter=None if (kind := f.maybe_whole("hosting_type")) is None else kind == HOSTING_DATACENTER,
        gpu_mem_bw_gb_s=f.maybe_amount("gpu_mem_bw"),
        total_tflops=f.maybe_amount("total_flops"),
    )


def row_of(f: Fields) -> Row:
    """Return an instance read from its JSON object in the listing.

    What the service does not say is None or computed from what it says. Only a row without an id cannot be
    read. One that lacks its machine or its price is odd, and still a machine of ours that bills: the others
    must not suffer from it, nor may it be overlooked.
    """
    priced = f.price("dph_total") is not None
    machine_id = f.whole_from("machine_id", 0)
    lacks = [
        name for name, there in (("dph_total", priced), ("machine_id", machine_id is not None)) if not there
    ]
    dph_total = f.price("dph_total") or 0.0
    storage_usd_h = f.price("storage_total_cost")
    if storage_usd_h is None:
        gb, usd_gb_month = f.maybe_amount("disk_space"), f.price("storage_cost")
        storage_usd_h = min(MAX_USD_H, (gb or 0.0) * (usd_gb_month or 0.0) / HOURS_PER_MONTH)
    dph_base, up_mins = f.price("dph_base"), f.maybe_amount("uptime_mins")
    cur_state = f.maybe_text("cur_state")
    # cur_state is the contract's: while it is stopped the GPU is given up, and not paid (2.12, 2.13).
    price_now = f.price_in("instance", "totalHour")
    if price_now is None:
        price_now = storage_usd_h if cur_state in ("stopped", "unloaded") else dph_total
    return Row(
        id=f.whole("id"),
        machine_id=machine_id,
        label=f.maybe_text("label"),
        actual_status=f.maybe_text("actual_status"),
        intended_status=f.maybe_text("intended_status"),
        cur_state=cur_state,
        status_msg=f.maybe_text("status_msg"),
        public_ip=f.host("public_ipaddr"),
        ports=_ports(f.mapping("ports")),
        ssh_host=f.host("ssh_host"),
        ssh_port=f.whole_from("ssh_port", 1, MAX_PORT),
        gpu_name=f.maybe_text("gpu_name") or "",
        num_gpus=f.whole_from("num_gpus", 1, MAX_GPUS) or 1,
        dph_base=max(0.0, dph_total - storage_usd_h) if dph_base is None else dph_base,
        dph_total=dph_total,
        storage_usd_h=storage_usd_h,
        price_now_usd_h=price_now,
        start_date=f.maybe_amount("start_date"),
        end_date=f.maybe_amount("end_date"),
        image=f.maybe_text("image_uuid"),
        onstart=f.script("onstart"),
        priced=priced,
        odd=f"it lacks {' and '.join(lacks)}" if lacks else None,
        up_s=None if up_mins is None else 60.0 * up_mins,
        inet_down_usd_gb=f.price("inet_down_cost"),
        inet_up_usd_gb=f.price("inet_up_cost"),
        host_id=f.maybe_whole("host_id"),
        gpu_ram_mb=f.maybe_amount("gpu_ram"),
        gpu_mem_bw_gb_s=f.maybe_amount("gpu_mem_bw"),
        total_tflops=f.maybe_amount("total_flops"),
    )


def charges_of(f: Fields) -> Charges | None:
    """Return the charges of one instance; None for those of something else, such as a volume."""
    kind, _, number = (f.maybe_text("source") or "").rpartition("-")
    if kind != "instance" or not number.isdecimal():
        return None
    parts = dict.fromkeys(("gpu", "disk", "bwd", "bwu"), 0.0)
    for item in f.rows("items"):
        of = f.inner("item", item)
        name, usd = of.maybe_text("type"), of.maybe_number("amount")
        if name in parts and usd is not None:
            parts[name] += usd
    label = f.inner("metadata", f.mapping("metadata")).maybe_text("label")
    traffic = parts["bwd"] + parts["bwu"]
    return Charges(int(number), label, parts["gpu"], parts["disk"], traffic, f.number("amount"))


def price_increase_of(f: Fields) -> PriceIncrease:
    """Return a pending price increase; what it does not change costs as before."""

    def usd_h(age: str) -> float:
        parts = ("gpu_costpersec", "disk_ram_costpersec")
        found = (f.maybe_amount(f"{age}_{part}") for part in parts)
        kept = (f.maybe_amount(f"old_{part}") for part in parts)
        return (
            sum((old or 0.0) if new is None else new for new, old in zip(found, kept, strict=True)) * 3600.0
        )

    return PriceIncrease(
        number=f.whole("pending_price_increase_id"),
        instance=f.whole("contract_id"),
        old_usd_h=usd_h("old"),
        new_usd_h=usd_h("new"),
        end_at=f.maybe_amount("contract_end_date"),
        new_end_at=f.maybe_amount("ask_end_date"),
    )


def has_label_prefix(f: Fields, prefix: str | None) -> bool:
    """Return whether the label of a listed instance begins with that prefix; None is the prefix of all."""
    return prefix is None or (f.maybe_text("label") or "").startswith(prefix)


def _ports(mapped: Mapping[str, object]) -> dict[int, int]:
    """Return the listing's tcp ports as {port in the container: port outside}.

    The listing says {"8000/tcp": [{"HostPort": "33526"}, …again for IPv6]}; what is not like that is left
    out.
    """
    ports = {}
    for inside, outside in mapped.items():
        port, _, protocol = inside.partition("/")
        first = outside[0] if isinstance(outside, list) and outside else None
        host_port = str(first.get("HostPort")) if isinstance(first, dict) else ""
        if protocol == "tcp" and _is_port(port) and _is_port(host_port):
            ports[int(port)] = int(host_port)
    return ports


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) <= MAX_PORT
