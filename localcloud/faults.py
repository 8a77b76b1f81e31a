"""What can go wrong at the local cloud: faults by name, switched on and off while it runs.

A fault strikes either calls to the API or boots of instances. `count` bounds how often it strikes (calls,
or boots of instances, each boot at most once), `seconds` how long it is on, `instance_id` which instance it
strikes. All times are seconds of the wall clock: they are not divided by the speedup. A lasting fault (ssh
hangs, offline, no credit) lets go when it is switched off or its time is over; one that changed a boot
(never-ready, fatal-line) holds until the next boot.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class BadFault(ValueError):
    """A fault has an unknown name, or a parameter that is unknown or out of range; the text says which."""


@dataclass(frozen=True)
class Param:
    """One parameter of a kind of fault: its default, what it means, and what it may be.

    It is a number in a range, a text out of choices, or a text up to 300 characters.
    """

    default: float | str
    says: str
    least: float = 0.0
    most: float = 1e9
    choices: tuple[str, ...] = ()

    def read(self, fault: str, name: str, value: object) -> float | str:
        """Return the parameter's value, given as JSON or as a flag's text; raise BadFault for a wrong one."""
        if isinstance(self.default, str):
            return self._text(fault, name, value)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not self.least <= number <= self.most:
            raise BadFault(
                f"fault {fault}: {name}: wanted {self.least:g} to {self.most:g}, got {value!r:.60}"
            )
        return number

    def _text(self, fault: str, name: str, value: object) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 300:
            raise BadFault(f"fault {fault}: {name}: wanted text of 1 to 300 characters, got {value!r:.60}")
        if self.choices and value not in self.choices:
            raise BadFault(
                f"fault {fault}: {name}: wanted one of {', '.join(self.choices)}, got {value!r:.60}"
            )
        return value


class Scope(StrEnum):
    """What a kind of fault strikes: calls to the API, boots of instances, or the account."""

    CALL = "call"
    INSTANCE = "instance"
    ACCOUNT = "account"


@dataclass(frozen=True)
class FaultKind:
    """A kind of fault: what it does in one line, what it strikes, and its own parameters."""

    says: str
    scope: Scope
    params: Mapping[str, Param] = field(default_factory=lambda: MappingProxyType({}))


COUNT = Param(0.0, "strikes at most so often", least=1, most=1e6)
SECONDS = Param(0.0, "is on for so long", least=0.01, most=1e7)
INSTANCE_ID = Param(0.0, "strikes only that one", least=1, most=1e12)

PERMISSIONS = ("instance_read", "instance_write", "misc", "user_read", "user_write")
"""Permissions of an API key that our calls need (docs.vast.ai/api-reference/permissions)."""

ROUTES = ("any", "list", "show", "search", "create", "change", "destroy", "logs", "account")
_STATUS = Param(500, "HTTP status of the answer", least=400, most=599)

_MODEL = Param("any", "the model, or any")
_IMAGE = Param("any", "the image with its tag, or any")

_CALL, _INSTANCE = Scope.CALL, Scope.INSTANCE

FAULTS: Mapping[str, FaultKind] = MappingProxyType(
    {
        # -- the API ------------------------------------------------------------------------------
        "list-hangs": FaultKind("the listing accepts the call and never answers", _CALL),
        "list-429": FaultKind("the listing answers 429, plain text", _CALL),
        "list-500": FaultKind("the listing answers 500", _CALL),
        "list-empty": FaultKind("the listing answers {} with status 200", _CALL),
        "list-missing": FaultKind(
            "the listing leaves rows out",
            _CALL,
            {
                "share": Param(1.0, "of the rows", least=0.01, most=1.0),
                "which": Param("newest", "which rows, or others each time", choices=("newest", "random")),
                "total": Param("short", "whether the totals leave them out too", choices=("short", "full")),
            },
        ),
        "list-odd": FaultKind(
            "the row of the oldest rental has a value that cannot be",
            _CALL,
            {
                "column": Param("dph_total", "the name of the value"),
                "value": Param("null", "the value, as JSON"),
            },
        ),
        "rate-limits": FaultKind("calls faster than the service's thresholds get 429, plain text", _CALL),
        "api-error": FaultKind(
            "calls get an error, before or after they had their effect",
            _CALL,
            {
                "status": _STATUS,
                "when": Param("before", "the effect or after it", choices=("before", "after")),
                "route": Param("any", "which calls", choices=ROUTES),
            },
        ),
        "api-hangs": FaultKind(
            "calls are accepted and never answered",
            _CALL,
            {
                "when": Param("before", "the effect or after it", choices=("before", "after")),
                "route": Param("any", "which calls", choices=ROUTES),
            },
        ),
        "create-lost": FaultKind("a create has its effect and the reply is lost: 504", _CALL),
        "create-410": FaultKind("the offer has gone: 410 no_such_ask", _CALL),
        "log-never": FaultKind("a log that was asked for is never uploaded", _CALL),
        "key-lacks": FaultKind(
            "the API key lacks a permission: calls that need it are refused",
            _CALL,
            {
                "permission": Param("instance_write", "the permission", choices=PERMISSIONS),
                "status": Param(401, "HTTP status of the refusal", least=401, most=403),
            },
        ),
        # -- the account --------------------------------------------------------------------------
        "credit-zero": FaultKind("the credit is used up: everything is stopped", Scope.ACCOUNT),
        # -- instances ----------------------------------------------------------------------------
        "docker-error": FaultKind(
            "stays in created, with a docker error in status_msg",
            _INSTANCE,
            {"msg": Param("Error response from daemon: OCI runtime create failed", "the status_msg")},
        ),
        "stuck-loading": FaultKind("stays in loading", _INSTANCE),
        "host-gives-up": FaultKind("stays in loading, meant to be stopped: the host gave up", _INSTANCE),
        "slow-pull": FaultKind(
            "the image pull takes longer, with progress in status_msg",
            _INSTANCE,
            {"factor": Param(5.0, "times as long", least=1.0, most=1_000.0)},
        ),
        "no-ports": FaultKind("runs, but the listing shows no ports", _INSTANCE),
        "port-drops": FaultKind(
            "the ports at the address shown are bound, and nobody answers there", _INSTANCE
        ),
        "ports-change": FaultKind("a restart brings other ports", _INSTANCE),
        "start-waits": FaultKind("a start waits for its GPU", _INSTANCE),
        "outbid": FaultKind("is stopped unasked, and comes back when the fault ends", _INSTANCE),
        "contract-ends": FaultKind(
            "its contract ends early: stopped, no start, deleted 48 h later",
            _INSTANCE,
            {"in_s": Param(60.0, "seconds until then", most=1e7)},
        ),
        "price-increase": FaultKind(
            "its host asks for a higher price from the end of the contract on",
            _INSTANCE,
            {"share": Param(0.5, "by which it is higher", least=0.01, most=10.0)},
        ),
        "offline": FaultKind("its host is lost: frozen, unreachable, and not billed", _INSTANCE),
        "ssh-hangs": FaultKind("ssh accepts connections and says nothing", _INSTANCE),
        "ssh-refuses": FaultKind("nobody listens at the ssh port", _INSTANCE),
        "new-host-key": FaultKind("shows a new ssh host key at its next boot", _INSTANCE),
        "never-ready": FaultKind("its model server loads for ever, from its next boot", _INSTANCE),
        "fatal-line": FaultKind(
            "its model server prints a fatal line instead of getting ready, from its next boot",
            _INSTANCE,
            {
                "line": Param(
                    "RuntimeError: Engine core initialization failed. See root cause above.", "the line"
                )
            },
        ),
        # -- hub and registry (hub.py) --------------------------------------------------------------
        "gated-model": FaultKind(
            "its model is gated, and opened by a token in HF_TOKEN",
            _INSTANCE,
            {"model": _MODEL, "token": Param("none", "the token that opens it")},
        ),
        "missing-model": FaultKind("the hub has no such model", _INSTANCE, {"model": _MODEL}),
        "unknown-architecture": FaultKind(
            "its engine does not know the model's architecture", _INSTANCE, {"model": _MODEL}
        ),
        "no-chat-template": FaultKind(
            "its model has no chat template: chats are refused", _INSTANCE, {"model": _MODEL}
        ),
        "wrong-argument": FaultKind(
            "its engine does not know an argument",
            _INSTANCE,
            {"argument": Param("--max-model-len", "the argument, where it is given")},
        ),
        "missing-image": FaultKind("the registry has no such image", _INSTANCE, {"image": _IMAGE}),
        "private-image": FaultKind(
            "the registry wants a login for its image",
            _INSTANCE,
            {"image": _IMAGE, "login": Param("none", "the login that opens it, as create sends it")},
        ),
        "dies-hot": FaultKind(
            "its processes are killed when its model has been loaded for a while",
            _INSTANCE,
            {
                "after_s": Param(0.0, "seconds after the model is loaded", most=1e6),
                "part": Param("all", "the model server alone, or everything", choices=("all", "model")),
            },
        ),
    }
)


def limits_of(kind: FaultKind) -> dict[str, Param]:
    """Return the parameters that bound when a fault of that kind strikes."""
    limits = {"seconds": SECONDS}
    if kind.scope is not Scope.ACCOUNT:
        limits["count"] = COUNT
    if kind.scope is Scope.INSTANCE:
        limits["instance_id"] = INSTANCE_ID
    return limits


def parse_flag(text: str) -> tuple[str, dict[str, str]]:
    """Split a flag NAME[:k=v,k=v…] into a fault's name and its arguments, unchecked.

    A comma within a value is part of it.
    """
    name, colon, rest = text.partition(":")
    args = {}
    for part in re.split(r",(?=[a-z_]+=)", rest) if colon else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise BadFault(f"fault {name}: wanted k=v, got {part!r:.60}")
        if key in args:
            raise BadFault(f"fault {name}: {key} given twice")
        args[key] = value
    return name, args


def table() -> Iterator[str]:
    """Yield one line for each fault with its parameters, for --help and the README."""
    for name, kind in FAULTS.items():
        params = [*kind.params, *limits_of(kind)]
        yield f"{name} ({', '.join(params)}): {kind.says}"


@dataclass
class Fault:
    """A fault that is switched on. ends_at: epoch seconds, None for never. struck: the boots it struck."""

    name: str
    args: Mapping[str, float | str]
    ends_at: float | None = None
    count: int | None = None
    instance_id: int | None = None
    strikes: int = 0
    struck: set[tuple[int, int]] = field(default_factory=set)

    def on(self, now: float) -> bool:
        """Return whether the fault is still on: its time is not over."""
        return self.ends_at is None or now < self.ends_at

    def strike(self, boot: tuple[int, int] | None) -> bool:
        """Return whether the fault strikes that boot, or without one the next call; if so, count it.

        boot: (instance id, boot number).
        """
        if self.instance_id is not None and (boot is None or boot[0] != self.instance_id):
            return False
        if boot in self.struck:
            return True
        if self.count is not None and self.strikes >= self.count:
            return False
        self.strikes += 1
        if boot is not None:
            self.struck.add(boot)
        return True

    def shown(self) -> dict[str, Any]:
        """Return the fault as the status page shows it: name, arguments, limits and number of strikes."""
        limits = {"count": self.count, "instance_id": self.instance_id, "ends_at": self.ends_at}
        return {
            "name": self.name,
            **self.args,
            **{k: v for k, v in limits.items() if v is not None},
            "strikes": self.strikes,
            "struck": sorted({instance_id for instance_id, _ in self.struck}),
        }


class Faults:
    """All faults of a local cloud that are switched on. Times are epoch seconds."""

    def __init__(self) -> None:
        """Make the list of faults with none switched on."""
        self._on: list[Fault] = []

    def add(self, name: str, args: Mapping[str, object], now: float) -> Fault:
        """Switch a fault on and return it. Raises BadFault, and changes nothing, for wrong arguments."""
        kind = FAULTS.get(name)
        if kind is None:
            raise BadFault(f"unknown fault {name!r:.60}; known: {', '.join(FAULTS)}")
        limits = limits_of(kind)
        known = {**kind.params, **limits}
        read = {}
        for key, value in args.items():
            if key not in known:
                raise BadFault(f"fault {name}: no parameter {key!r:.60}; it has {', '.join(known)}")
            read[key] = known[key].read(name, key, value)
        for key in ("count", "instance_id"):
            if key in read and read[key] != int(read[key]):
                raise BadFault(f"fault {name}: {key}: wanted a whole number, got {read[key]!r}")
        fault = Fault(
            name,
            {key: read.get(key, param.default) for key, param in kind.params.items()},
            ends_at=now + float(read["seconds"]) if "seconds" in read else None,
            count=int(read["count"]) if "count" in read else None,
            instance_id=int(read["instance_id"]) if "instance_id" in read else None,
        )
        self._on.append(fault)
        return fault

    def remove(self, name: str) -> int:
        """Switch off all faults of that name; return how many. Raises BadFault for an unknown name."""
        if name not in FAULTS:
            raise BadFault(f"unknown fault {name!r:.60}; known: {', '.join(FAULTS)}")
        before = len(self._on)
        self._on = [f for f in self._on if f.name != name]
        return before - len(self._on)

    def expire(self, now: float) -> None:
        """Switch off the faults whose time is over."""
        self._on = [f for f in self._on if f.on(now)]

    def next_end(self) -> float | None:
        """Return when the next fault's time is over; None when none of them ends by itself."""
        return min((f.ends_at for f in self._on if f.ends_at is not None), default=None)

    def shown(self, now: float) -> list[dict[str, Any]]:
        """Return all faults that are on, as the status page shows them."""
        return [f.shown() for f in self._on if f.on(now)]

    def any_on(self, name: str) -> bool:
        """Return whether a fault of that name may be on: a quick check before `strikes`."""
        return any(f.name == name for f in self._on)

    def strikes(self, name: str, now: float, boot: tuple[int, int] | None = None) -> Mapping[str, Any] | None:
        """Return the arguments of a fault that strikes now, or None; count the strike.

        boot: (instance id, boot number) for faults of instances. A boot is struck but once, so asking again
        gives the same answer; without a boot each call is a strike.
        """
        for fault in self._on:
            if fault.name == name and fault.on(now) and fault.strike(boot):
                return fault.args
        return None

    def strikes_permission(self, permission: str, now: float) -> Mapping[str, Any] | None:
        """Return the arguments of the fault key-lacks if it takes that permission; None otherwise."""
        for fault in self._on:
            lacks = fault.name == "key-lacks" and fault.args["permission"] == permission
            if lacks and fault.on(now) and fault.strike(None):
                return fault.args
        return None

    def strikes_host(self, instance_id: int, boot: tuple[int, int] | None, now: float) -> bool:
        """Return whether the fault offline strikes the host of that rental.

        boot: of the rental; None when only a fault that names the rental may strike.
        """
        return any(
            (fault.instance_id == instance_id or (fault.instance_id is None and boot is not None))
            and fault.strike(boot or (instance_id, 0))
            for fault in self._on
            if fault.name == "offline" and fault.on(now)
        )

    def strikes_route(self, name: str, route: str, when: str, now: float) -> Mapping[str, Any] | None:
        """Return the arguments of a fault that strikes a call of this route at this moment, or None.

        It counts the strike. when: "before" or "after" the effect of the call.
        """
        for fault in self._on:
            fits = fault.args.get("when") == when and fault.args.get("route") in ("any", route)
            if fault.name == name and fits and fault.on(now) and fault.strike(None):
                return fault.args
        return None
