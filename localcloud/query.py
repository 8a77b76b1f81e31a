"""The query language in which the API searches and sorts offers and instances."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from localcloud.offers import Slot, offer
from localcloud.regions import REGIONS

OFFER_LIMIT = 64
"""Most offers in an answer to a query that sets no limit."""


_OFFER_FIELDS = (
    "bw_nvlink compute_cap cpu_arch cpu_cores cpu_cores_effective cpu_ghz cpu_ram cuda_max_good datacenter "
    "direct_port_count driver_version disk_bw disk_space dlperf dlperf_per_dphtotal dph_total dph_base "
    "duration external flops_per_dphtotal gpu_arch gpu_display_active gpu_frac gpu_mem_bw gpu_name gpu_ram "
    "gpu_total_ram gpu_max_power gpu_max_temp has_avx host_id id inet_down inet_down_cost inet_up "
    "inet_up_cost machine_id min_bid mobo_name num_gpus pci_gen pcie_bw reliability reliability2 rentable "
    "rented storage_cost static_ip total_flops ubuntu_version verification verified vms_enabled geolocation "
    "cluster_id"
)
OFFER_FIELDS = frozenset(_OFFER_FIELDS.split())
"""Fields by which offers may be searched (vast-contract 2.1)."""

OPERATORS = ("eq", "neq", "gt", "gte", "lt", "lte", "in", "notin")
_COMPARISONS = {"gt": gt, "gte": ge, "lt": lt, "lte": le}


class BadQuery(ValueError):
    """A query for offers or instances that cannot be evaluated; the text says why."""


def matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    """Return whether a row of an offer or instance passes all filters, {"field": {"operator": operand}}.

    Operands travel as text, so each is read as the type of the row's value: "1" is a number beside a number.
    Raises BadQuery for an unknown operator or an operand that cannot be read so.
    """
    return all(_passes(_value(row, name), name, wanted) for name, wanted in filters.items())


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name == "verified":
        return row["verification"] == "verified"
    # The CLI turns 535.86.05 into 535086005, which offers carry under another name.
    return row.get("driver_vers" if name == "driver_version" else name)


def _passes(value: Any, name: str, wanted: object) -> bool:
    if not isinstance(wanted, Mapping):
        raise BadQuery(f"{name}: wanted an object of operators, got {wanted!r:.60}")
    return all(_holds(value, name, operator, operand) for operator, operand in wanted.items())


def _holds(value: Any, name: str, operator: str, operand: object) -> bool:
    if operator not in OPERATORS:
        raise BadQuery(f"{name}: unknown operator {operator!r}; known: {' '.join(OPERATORS)}")
    if operator in ("in", "notin"):
        if not isinstance(operand, Sequence) or isinstance(operand, str):
            raise BadQuery(f"{name}: {operator} wants a list, got {operand!r:.60}")
        found = any(_equal(value, name, each) for each in operand)
        return found if operator == "in" else not found
    if operator in ("eq", "neq"):
        return _equal(value, name, operand) == (operator == "eq")
    if value is None:
        return False
    ours, theirs = _comparable(value, name, operand)
    return bool(_COMPARISONS[operator](ours, theirs))


def _equal(value: Any, name: str, operand: object) -> bool:
    if value is None or operand is None:
        return value is operand
    if name == "geolocation":
        country = value.rpartition(", ")[2]
        # A country's or region's code stands for all that lies there.
        return operand in (country, value) or country in REGIONS.get(str(operand), ())
    ours, theirs = _comparable(value, name, operand)
    return bool(ours == theirs)


def _comparable(value: Any, name: str, operand: object) -> tuple[Any, Any]:
    """Return a row's value and an operand, both in the type that the row has.

    Raises BadQuery for an operand that cannot be read so.
    """
    if isinstance(value, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        read = words.get(str(operand).lower())
        if read is None:
            raise BadQuery(f"{name}: wanted true or false, got {operand!r:.60}")
        return value, read
    if isinstance(value, int | float):
        try:
            number = float(operand)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise BadQuery(f"{name}: wanted a number, got {operand!r:.60}") from None
        if math.isnan(number):
            raise BadQuery(f"{name}: not a number")
        return value, number
    return str(value), str(operand)


@dataclass(frozen=True)
class Query:
    """A search for offers, read from the body that the CLI sends."""

    filters: Mapping[str, Any]
    order: tuple[tuple[str, bool], ...] = (("score", True),)
    limit: int = OFFER_LIMIT
    bid: bool = False
    disk_gb: float = 5.0
    bundled: bool = True

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Query":
        """Return the query in the body of a search (vast-contract 2.1); raise BadQuery with what is wrong."""
        body = dict(body)
        kind = body.pop("type", "on-demand")
        if kind not in ("on-demand", "ondemand", "reserved", "bid", "interruptible"):
            raise BadQuery(f"type: wanted on-demand, reserved or bid, got {kind!r:.60}")
        limit = _whole(body.pop("limit", None), "limit", OFFER_LIMIT)
        disk_gb = body.pop("allocated_storage", 5.0)
        if isinstance(disk_gb, bool) or not isinstance(disk_gb, int | float) or not 0 <= disk_gb <= 10**6:
            raise BadQuery(f"allocated_storage: wanted 0 to 1000000, got {disk_gb!r:.60}")
        order = order_of(body.pop("order", [["score", "desc"]]))
        bundled = body.pop("disable_bundling", None) is not True
        for name in body:
            if name not in OFFER_FIELDS:
                raise BadQuery(f"unknown field {name!r:.60}")
        return cls(body, order, limit, kind in ("bid", "interruptible"), float(disk_gb), bundled)

    def answer(self, slots: Iterable[Slot], now: float) -> list[dict[str, Any]]:
        """Return the offers that match the query, in its order; a machine without the disk gives none.

        Of slices of one machine that are alike one is shown, as by the service, unless that is switched off.
        """
        there = [slot for slot in slots if slot.free_disk_gb >= self.disk_gb]
        if self.bundled:
            there = list(_bundled(there))
        rows = [offer(slot, self.disk_gb, now, bid=self.bid) for slot in there]
        found = [row for row in rows if matches(row, self.filters)]
        return in_order(found, self.order)[: self.limit]


def _bundled(slots: Iterable[Slot]) -> Iterator[Slot]:
    """Yield the slots; of slices of a machine that are alike only one, a free one if there is any."""
    best: dict[tuple[int, int], Slot] = {}
    for slot in slots:
        if not slot.machine.sliced:
            yield slot
            continue
        key = slot.machine.machine_id, slot.machine.num_gpus
        if key not in best or (best[key].rented and not slot.rented):
            best[key] = slot
    yield from best.values()


def order_of(said: object) -> tuple[tuple[str, bool], ...]:
    """Return a query's order [["name", "asc"|"desc"], …] as pairs (name, descending); raise BadQuery."""
    if not isinstance(said, list):
        raise BadQuery(f"order: wanted a list, got {said!r:.60}")
    order = []
    for each in said:
        if not (isinstance(each, list) and len(each) == 2 and isinstance(each[0], str)):
            raise BadQuery(f"order: wanted [name, asc or desc], got {each!r:.60}")
        if each[1] not in ("asc", "desc"):
            raise BadQuery(f"order: wanted asc or desc, got {each[1]!r:.60}")
        order.append((each[0], each[1] == "desc"))
    return tuple(order)


def in_order(rows: list[dict[str, Any]], order: Iterable[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Return the rows sorted; a missing value comes first when ascending, equal rows are ordered by id."""
    rows = sorted(rows, key=lambda row: int(row["id"]))
    for name, descending in reversed(tuple(order)):
        rows.sort(key=lambda row: sort_key(row.get(name)), reverse=descending)
    return rows


def sort_key(value: Any) -> tuple[int, Any]:
    """Return a key by which missing values, numbers and texts can be sorted in one list."""
    if value is None:
        return 0, 0
    if isinstance(value, int | float):
        return 1, value
    return 2, str(value)


def _whole(value: object, name: str, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadQuery(f"{name}: wanted a whole number of 1 or more, got {value!r:.60}")
    return value
