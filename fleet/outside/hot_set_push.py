"""Tells the loadbalancers of a changed hot set at once; they also ask for it by themselves."""

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import aiohttp
import msgspec

from engine.step_time_constants import Timing
from fleet.hot_set import make_hot_set
from fleet.instance import Instance
from fleet.outside.turns import Autoscaler
from fleet.outside.wakeup import Wakeup
from fleet_client.own_tls import ANY_AUTHORITY, TrustedServer
from web.messages.decoding import BadField, decode
from web.messages.hot_set import HotSet, HotSetTaken

log = logging.getLogger("autoscaler")

HOT_PUSH_S = 0.25
"""Seconds between two looks for a changed hot set; a passed check is told at once."""

REPEAT_S = 10.0
"""Seconds between two pushes of the same hot set to a loadbalancer that reports nothing: so that it is known
whether it is there."""

MAX_TAKEN = 4096
"""Bytes of the answer to a push."""

PUSH_TIMEOUT_S = 3.0
"""Seconds after which a loadbalancer that does not answer is tried again."""


def current_hot_set(scaler: Autoscaler, master_token: Callable[[str], str]) -> HotSet | None:
    """Return the present hot set, which is secret, or None while the fleet is not known yet."""
    now, profile = scaler.clock(), scaler.instances.profile
    with scaler.lock:
        if not scaler.instances.knows_hot_set():
            return None
        serving = [replace(i) for i in scaler.instances.serving()]
        version, expected_hot_s = scaler.instances.hot_version, scaler.instances.expected_hot_s(now)

    def timing(i: Instance) -> Timing | None:
        return None if profile.shape is None else profile.timing_on(i.gpu_name, i.num_gpus, i.gpu_told)

    return make_hot_set(serving, scaler.demand.epoch, version, expected_hot_s, profile, master_token, timing)


# --- outside world ---------------------------------------------------------------------------------


class HotSetPush:
    """Sends each new version of the hot set to each loadbalancer; one that hangs delays no other."""

    def __init__(
        self,
        version: Callable[[], int],
        hot_set: Callable[[], HotSet | None],
        loadbalancers: Sequence[str],
        control_key: str,
        trusted: TrustedServer = ANY_AUTHORITY,
        taken: Callable[[str, str], None] = lambda _name, _url: None,
        reports: Callable[[str], bool] = lambda _name: True,
    ) -> None:
        """Start nothing yet. version, hot_set: functions that return the present ones.

        loadbalancers: their URLs. trusted: the certificates that they may show. taken: is called with name
        and URL of a loadbalancer that has taken the hot set. reports: whether that one reports now.
        """
        self._taken, self._reports = taken, reports
        self.wakeup = Wakeup()  # to look for a new version now
        self._version = version
        self._hot_set = hot_set
        self._loadbalancers = loadbalancers
        self._trusted = trusted
        self._headers = {"Authorization": f"Bearer {control_key}", "Content-Type": "application/json"}

    async def run(self) -> None:
        """Send each new version of the hot set to all loadbalancers; never return."""
        timeout = aiohttp.ClientTimeout(total=PUSH_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=self._headers) as session:
            await asyncio.gather(*(self._push_to(session, url) for url in self._loadbalancers))

    async def _push_to(self, session: aiohttp.ClientSession, url: str) -> None:
        told: int | None = None
        complaint: str | None = None
        name: str | None = None  # that it gives itself
        look_at = math.inf  # whether it reports
        while True:
            silent = time.monotonic() >= look_at and name is not None and not self._reports(name)
            hot_set = self._hot_set() if silent or told != self._version() else None
            if hot_set is not None:
                name, trouble = await _push(session, url, hot_set, self._trusted.context() or True)
                if trouble is None:
                    told = hot_set.version
                    look_at = time.monotonic() + REPEAT_S
                    if name is not None:
                        self._taken(name, url)
                elif trouble != complaint:
                    log.warning("loadbalancer %s %s; it will ask when it can", url, trouble)
                complaint = trouble
            await self.wakeup.wait(HOT_PUSH_S)


async def _push(
    session: aiohttp.ClientSession, url: str, hot_set: HotSet, trusted: ssl.SSLContext | bool
) -> tuple[str | None, str | None]:
    """Send the hot set to a loadbalancer; return (its name if it says so, why it was not taken if not)."""
    data = msgspec.json.encode(hot_set)
    try:
        async with session.put(f"{url}/hot", data=data, allow_redirects=False, ssl=trusted) as reply:
            if reply.status != 200:
                return None, f"refused the hot set: {reply.status}"
            try:
                said = decode(await reply.content.read(MAX_TAKEN), HotSetTaken)
            except BadField:
                return None, None  # it was taken, whatever else is said
            return said.loadbalancer, None
    except aiohttp.ClientSSLError as e:
        return None, f"cannot be spoken to under TLS (--loadbalancer-cert): {e}"
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        return None, f"is not there: {type(e).__name__}"
