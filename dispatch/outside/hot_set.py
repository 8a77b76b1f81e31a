"""Decodes the hot set that the autoscaler sends, in slices, between which requests are answered."""

import time
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta, Raw, structs

from fleet_client import tls_pins
from web.messages.decoding import BadField, decode
from web.messages.hot_set import MAX_INSTANCES, HotInstance, HotSet, HotSetHead
from web.slices import in_slices


class _ScannedHotSet(HotSetHead, frozen=True):
    """A hot set whose instances are not decoded yet."""

    instances: Annotated[list[Raw], Meta(max_length=MAX_INSTANCES)]


class HotSetReader:
    """Decodes hot sets; an instance whose text is the same as in the last one gives the same object."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start without a last hot set. clock: seconds, by which the decoding is cut into slices."""
        self._clock = clock
        self._known: dict[bytes, HotInstance] = {}

    async def read(self, raw: bytes) -> HotSet:
        """Return the hot set in the body of a message; raise BadField if it is not valid."""
        scanned = decode(raw, _ScannedHotSet)
        known: dict[bytes, HotInstance] = {}
        ids: set[int] = set()
        # 10,000 new certificates take about a second.
        n = 0
        async for part in in_slices(scanned.instances, self._clock):
            text = bytes(part)
            one = self._known.get(text) or _instance(text, f"instances[{n}]")
            if one.id in ids:
                raise BadField(f"instances[{n}].id", f"{one.id} is there twice")
            ids.add(one.id)
            known[text] = one
            n += 1
        self._known = known
        return HotSet(**(structs.asdict(scanned) | {"instances": tuple(known.values())}))


def _instance(text: bytes, inside: str) -> HotInstance:
    """Return the instance in a text of JSON; raise BadField if its URLs and its certificate do not fit.

    inside: where the text stands in its message, for the error.
    """
    one = decode(text, HotInstance, inside)
    for name, url in (("address", one.address), ("auth_url", one.auth_url)):
        try:
            tls_pins.check(url, one.certificate)
        except ValueError as e:
            raise BadField(f"{inside}.{name}", f"{url[:60]!r}: {e}") from None
    if one.certificate is not None:
        try:
            tls_pins.public_key_sha256(one.certificate)
        except ValueError as e:
            raise BadField(f"{inside}.certificate", str(e)) from None
    return one
