"""What is done before and after each API view: the key, faults of calls, rate limits, refusals."""

import functools
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Concatenate

from flask import Flask, Response, current_app, jsonify, request

from localcloud.cloud import Cloud
from localcloud.orders import CloudRefusal
from localcloud.query import BadQuery
from localcloud.world import World

HANG_S = 300.0
"""Longest seconds for which a call that a fault lets hang is kept open, if its caller does not hang up."""

HUNG_UP_CHECK_S = 0.25
"""Seconds between two checks whether the caller of a call that hangs is still connected."""

CREATE_PENALTY_S = 12.0
"""Seconds to wait after a create that came too soon (vast-contract 1.3)."""

PERMISSION_FOR: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("list", "show", "logs"), "instance_read")
    | dict.fromkeys(("create", "change", "destroy"), "instance_write")
    | {"search": "misc"}
)
"""Which permission of the key a kind of call needs; those of the account, to read or to write the user."""

_EXTENSION = "localcloud"


@dataclass(frozen=True)
class Later:
    """An answer that a view leaves to `rest`, which is called after the cloud's lock was released."""

    rest: Callable[[], Any]


@dataclass(frozen=True)
class Service:
    """What all views of one app share: the cloud's world, the API key and the rate limits.

    not_before: when each endpoint may be called again, epoch seconds.
    """

    world: World
    api_key: str
    not_before: dict[str, float] = field(default_factory=dict)

    def knows_key(self) -> bool:
        """Return whether the request being served carries the API key."""
        header = request.headers.get("Authorization", "")
        return hmac.compare_digest(header.encode(), f"Bearer {self.api_key}".encode())

    def lacks_permission(self, kind: str) -> tuple[Response, int] | None:
        """Return the refusal of a call for which the key has no permission by the fault key-lacks."""
        writes = "user_read" if request.method == "GET" else "user_write"
        with self.world.lock:
            now, faults = self.world.clock(), self.world.cloud.faults
            lacks = faults.strikes_permission(PERMISSION_FOR.get(kind, writes), now)
        if lacks is None:
            return None
        msg = f"This API key lacks the permission {lacks['permission']}."
        return refuse(int(lacks["status"]), "auth_error", msg)

    def limited(self, view: str, every_s: float) -> bool:
        """Return whether this call comes too soon, if the service limits the rate of calls.

        every_s: seconds between two calls of the view that the service allows, 0 for no limit.
        """
        with self.world.lock:
            now, cloud = self.world.clock(), self.world.cloud
            always = cloud.realism.rate_limits
            if not every_s or not (always or cloud.faults.any_on("rate-limits")):
                return False
            early = now < self.not_before.get(view, 0.0)
            wait_s = CREATE_PENALTY_S if early and view == "create" else every_s
            self.not_before[view] = now + wait_s / cloud.speedup
            return early and (always or cloud.faults.strikes("rate-limits", now) is not None)

    def broken(self, kind: str, when: str) -> Any | None:
        """Return the answer of a fault that strikes a call of this kind, None if there is no such fault.

        when: "before" or "after" the call had its effect.
        """
        now, faults = self.world.clock(), self.world.cloud.faults
        with self.world.lock:
            stuck = faults.strikes_route("api-hangs", kind, when, now) is not None
            error = faults.strikes_route("api-error", kind, when, now)
        if stuck:
            return hang()
        return error and refuse(int(error["status"]), "injected", "an error by the fault api-error")


def connect(app: Flask, world: World, api_key: str) -> None:
    """Give the views of the app their world and API key."""
    app.extensions[_EXTENSION] = Service(world, api_key)


def service() -> Service:
    """Return what all views share, for the view that is running."""
    found: Service = current_app.extensions[_EXTENSION]
    return found


def api(
    kind: str, every_s: float = 0.0
) -> Callable[[Callable[Concatenate[Cloud, float, ...], Any]], Callable[..., Any]]:
    """Return a decorator that makes a function (cloud, now, **path) a view of the service's API.

    The view runs under the cloud's lock. kind: which faults of calls strike it. every_s: seconds between two
    calls that the service allows (vast-contract 1.3), 0 for no limit.
    """

    def decorate(view: Callable[Concatenate[Cloud, float, ...], Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def guarded(**path: Any) -> Any:
            ours = service()
            if not ours.knows_key():
                return refuse(401, "auth_error", "Invalid user key")
            if (refused := ours.lacks_permission(kind)) is not None:
                return refused
            if ours.limited(view.__name__, every_s):
                return too_many()
            if (answer := ours.broken(kind, "before")) is not None:
                return answer
            try:
                with ours.world.lock:
                    answer = view(ours.world.cloud, ours.world.clock(), **path)
            except CloudRefusal as e:
                return refuse(e.status, e.error, e.msg, **e.also)
            except BadQuery as e:
                return refuse(400, "invalid_request", str(e))
            finally:
                ours.world.kick()
            if isinstance(answer, Later):
                answer = answer.rest()
            struck = ours.broken(kind, "after")
            return answer if struck is None else struck

        return guarded

    return decorate


def refuse(status: int, error: str, msg: str, **also: Any) -> tuple[Response, int]:
    """Return an error answer in the service's shape. also: further fields."""
    return jsonify({"success": False, "error": error, "msg": msg, **also}), status


def too_many() -> Response:
    """Return the service's answer to calls that come too fast: 429."""
    return Response("API requests too frequent", 429, mimetype="text/plain")


def hang() -> tuple[Response, int]:
    """Wait until the cloud ends, the caller hangs up or HANG_S have passed; only then return an error."""
    hung_up = request.environ.get("waitress.client_disconnected", lambda: False)
    limit = time.monotonic() + HANG_S
    while not (service().world.stopping.wait(HUNG_UP_CHECK_S) or hung_up() or time.monotonic() > limit):
        pass
    return refuse(504, "timeout", "the local cloud had this call hang")
