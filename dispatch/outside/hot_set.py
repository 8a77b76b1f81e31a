"""Read the hot set that the autoscaler sends."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

from dispatch.types import HotInstance, HotSet
from engine.timing import Timing
from fleet_client import tls_pins
from web.bodies import BadField, Choice, Field, ListOf, Mapping, Number, Text, Whole, check_fields, json_parts

MAX_HOT_BODY = 32 * 2**20
"""Bytes of a hot set: 10,000 instances at about 2 kB, most of which is the certificate."""


# -- the hot set, as it is told --------------------------------------------------------------------------

_HOT: dict[str, Field] = {
    "epoch": Text(1, 64),
    "version": Whole(0, 2**53),
    "model": Text(1, 200),
    "prefill_weight": Number(0.0, 100.0),
    "expected_output_tokens": Number(1.0, 1e6),
    "expected_hot_s": Number(0.0, 1e6, optional=True),
    "instances": ListOf(Mapping(), 0),  # those that there are have been read by then
}

MAX_INSTANCES = 20_000

_HOT_INSTANCE: dict[str, Field] = {
    "id": Whole(0, 2**53),
    "state": Choice(("hot", "draining")),
    "address": Text(8, 300),
    "auth_url": Text(8, 300),
    "master_token": Text(1, 200),
    "throughput_work_s": Number(1e-3, 1e9),
    "capacity_work": Number(1e-3, 1e12),
    "certificate": Text(1, tls_pins.LONGEST, optional=True),
    "timing": Mapping(optional=True),
}

_TIMING: dict[str, Field] = {
    **{name: Number(0.0, 1e6) for name in "abcdef"},
    "kv_tokens": Whole(1, 10**9),
    "max_seqs": Whole(1, 10**9),
    "step_tokens": Whole(1, 10**9),
}


SLICE_S = 0.004
"""So long is read of a hot set at a time; 10,000 new certificates take seconds in all."""


class HotReader:
    """Reads hot sets; an instance that is told as in the one before is the same object."""

    def __init__(self) -> None:
        """None has been read."""
        self._known: dict[int, tuple[dict[str, Any], HotInstance]] = {}

    def read(self, parts: Iterable[tuple[str, Any, bool]]) -> Iterator[HotSet | None]:
        """The hot set whose fields these are (web.bodies.json_parts); None at each step before.

        BadField names what is wrong with it.
        """
        known: dict[int, tuple[dict[str, Any], HotInstance]] = {}
        fields: dict[str, Any] = {}
        n = 0
        for name, value, entry in parts:
            if not entry:
                fields[name] = value
                continue
            told = self._told(value, n)
            if told.id in known:
                raise BadField(f"instances[{n}].id", f"{told.id} is there twice")
            if n == MAX_INSTANCES:
                raise BadField("instances", f"wanted at most {MAX_INSTANCES}")
            known[told.id] = value, told
            n += 1
            yield None
        hot = check_fields(fields, _HOT)
        self._known = known
        yield HotSet(
            epoch=hot["epoch"],
            version=hot["version"],
            model=hot["model"],
            prefill_weight=hot["prefill_weight"],
            expected_output_tokens=hot["expected_output_tokens"],
            expected_hot_s=hot.get("expected_hot_s"),
            instances=tuple(told for _, told in known.values()),
        )

    def _told(self, said: object, n: int) -> HotInstance:
        if isinstance(said, dict) and isinstance(said.get("id"), int):
            before = self._known.get(said["id"])
            if before is not None and before[0] == said:
                return before[1]
        return _parse_instance(said, f"instances[{n}].")


def _parse_instance(said: object, inside: str) -> HotInstance:
    told = check_fields(said, _HOT_INSTANCE, inside)
    certificate = told.get("certificate")
    for name in ("address", "auth_url"):
        try:
            tls_pins.check(told[name], certificate)
        except ValueError as e:
            raise BadField(f"{inside}{name}", f"{told[name][:60]!r}: {e}") from None
    try:
        key = None if certificate is None else tls_pins.public_key_sha256(certificate)
    except ValueError as e:
        raise BadField(f"{inside}certificate", str(e)) from None
    timing = told.pop("timing", None)
    if timing is not None:
        timing = Timing("told", **check_fields(timing, _TIMING, f"{inside}timing."))
    draining = told.pop("state") == "draining"
    return HotInstance(draining=draining, public_key_sha256=key, timing=timing, **told)


def parse_hot(said: object) -> HotSet:
    """The hot set in a decoded body; BadField names what is wrong with it."""
    (hot,) = (hot for hot in HotReader().read(_parts(said)) if hot is not None)
    return hot


def _parts(said: object) -> Iterator[tuple[str, Any, bool]]:
    for name, value in Mapping().check("body", said).items():
        entries = value if name == "instances" and isinstance(value, list) else None
        yield name, value if entries is None else [], False
        for one in entries or ():
            yield name, one, True


async def read_hot(reader: HotReader, raw: bytes) -> HotSet:
    """The hot set in a body, read a little at a time: meanwhile others are answered."""
    begun = time.perf_counter()
    for hot in reader.read(json_parts(raw, "instances")):
        if hot is not None:
            return hot
        if time.perf_counter() - begun > SLICE_S:
            await asyncio.sleep(0)
            begun = time.perf_counter()
    raise RuntimeError("a hot set has no end")
