"""What is asked of a fleet under each unkindness: a day, and whether what became of it is right.

A row is a function that plays a day with one unkindness on (or the two that need each other) and returns
whether the fleet did right, and the figures. To add one: write it, and name it in ROWS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bench.unkind.play import Day, Fleet, Outcome


@dataclass(frozen=True)
class Verdict:
    """Whether a fleet did right, and its figures in a line."""

    right: bool
    figures: str


Play = Callable[[Day], Outcome]
"""Plays a day with one version of the code."""


def _card(machine_id: int, usd: float, **other: Any) -> dict[str, Any]:
    """Return a machine with one RTX 4090, each on a host of its own unless it is said otherwise."""
    return {
        "machine_id": machine_id,
        "gpu_name": "RTX 4090",
        "usd_gpu_h": usd,
        "slots": 4,
        "host_id": 5_000 + machine_id,
        **other,
    }


_GOOD = [_card(11, 0.45), _card(12, 0.46), _card(13, 0.47)]
"""Machines on which all goes well."""


def _no_waste(outcome: Outcome, hot: int) -> Verdict:
    """Right: as many are hot as were wanted, none was rented in vain, and no machine is banned."""
    right = outcome.hot_s is not None and len(outcome.rented) == hot and not outcome.banned
    return Verdict(right, outcome.says())


def _books(outcome: Outcome, hot: int, most_off: float = 0.05) -> Verdict:
    """Right: nothing is wasted, and the ledger has the dollars that the account was charged."""
    well, said = _no_waste(outcome, hot), outcome.ledger_usd or 0.0
    right = well.right and abs(said - outcome.charged_usd) < most_off * outcome.charged_usd
    return Verdict(right, f"{well.figures}, ledger ${said:.4f}")


def kind(play: Play) -> Verdict:
    """Nothing is unkind: both versions must do right, else a row shows nothing."""
    return _no_waste(play(Day(only=(), machines=_GOOD)), 1)


def script_bytes(play: Play) -> Verdict:
    """A start script over the documented limits never starts."""
    return _no_waste(play(Day(only=("script_bytes",), machines=_GOOD, most_s=45.0)), 1)


def ssh_greeting(play: Play) -> Verdict:
    """A login is greeted before the output of its command."""
    return _no_waste(play(Day(only=("ssh_greeting",), machines=_GOOD, most_s=45.0)), 1)


def ssh_tmux(play: Play) -> Verdict:
    """A login runs nothing, since there is no session of tmux."""
    return _no_waste(play(Day(only=("ssh_tmux",), machines=_GOOD, most_s=45.0)), 1)


def ssh_key_lag_s(play: Play) -> Verdict:
    """The account's key comes two minutes late."""
    return _no_waste(play(Day(only=("ssh_key_lag_s",), machines=_GOOD, most_s=45.0)), 1)


def ssh_keys_lost(play: Play) -> Verdict:
    """The two cheapest machines never take the account's key."""
    lost = [_card(n, 0.3) for n in (1, 2)]
    return _no_waste(play(Day(only=("ssh_keys_lost",), machines=[*lost, *_GOOD], most_s=45.0)), 1)


def ssh_refused(play: Play) -> Verdict:
    """On the two cheapest machines nobody ever listens for ssh."""
    refused = [_card(n, 0.3) for n in (10, 30)]
    return _no_waste(play(Day(only=("ssh_refused",), machines=[*refused, *_GOOD], most_s=45.0)), 1)


def host_gives_up(play: Play) -> Verdict:
    """The host of the first machine gives up loading it: that one is banned, and another is hot in time."""
    outcome = play(Day(only=(), machines=_GOOD, faults=("host-gives-up:count=1",), most_s=40.0, whole=True))
    right = outcome.hot_s is not None and (len(outcome.rented), len(outcome.banned)) == (2, 1)
    return Verdict(right, outcome.says())


def old_drivers(play: Play) -> Verdict:
    """The two cheapest machines have a driver that is too old for the image's CUDA."""
    old = [_card(n, 0.3, cuda_max_good=12.4, driver_version="550.54.15") for n in (1, 2)]
    return _no_waste(play(Day(only=("old_drivers",), machines=[*old, *_GOOD])), 1)


def foreign_cpus(play: Play) -> Verdict:
    """The two cheapest machines have a processor for which the image is not made."""
    arm = [_card(n, 0.3, cpu_arch="arm64") for n in (1, 2)]
    return _no_waste(play(Day(only=("foreign_cpus",), machines=[*arm, *_GOOD], most_s=60.0)), 1)


def sizes(play: Play) -> Verdict:
    """Four that load at once on the cheapest machine share its link; the last takes over half an hour."""
    slow = _card(1, 0.3, inet_down=210.0)
    four = ("--max-instances", "4")
    day = Day(only=("sizes",), machines=[slow, *_GOOD], hot=4, most_s=80.0, autoscaler=four)
    return _no_waste(play(day), 4)


def big_market(play: Play) -> Verdict:
    """A hundred machines, of which the cheapest for their work have another processor or an old driver."""
    return _no_waste(play(Day(only=("big_market", "foreign_cpus", "old_drivers"), hot=2)), 2)


def renters(play: Play) -> Verdict:
    """Half of all machines are taken, and what others give back comes and goes."""
    return _no_waste(play(Day(only=("renters",), hot=2)), 2)


def price_moves(play: Play) -> Verdict:
    """Prices of new rentals move; what is charged stays what it was, and the ledger says the same."""
    return _books(play(Day(only=("price_moves",), speedup=600.0, most_s=30.0, whole=True)), 1, 0.1)


def offers_vanish(play: Play) -> Verdict:
    """A tenth of the offers is gone when it is ordered."""
    return _no_waste(play(Day(only=("offers_vanish",), hot=2)), 2)


def rate_limits(play: Play) -> Verdict:
    """Calls faster than the service allows are refused."""
    return _no_waste(play(Day(only=("rate_limits",), hot=2)), 2)


def _held(outcome: Outcome) -> Verdict:
    """Right: what every machine would fail of has cost two at most, no machine is blamed, and it is said."""
    holds = outcome.health.get("holds") or []
    right = len(outcome.rented) <= 2 and not outcome.banned and bool(holds)
    return Verdict(right, f"{outcome.says()}, {len(holds)} reasons held")


def _fault(name: str, play: Play) -> Verdict:
    """Play 40 s with a fault that strikes every machine from the start."""
    return _held(play(Day(only=(), machines=_GOOD, faults=(name,), most_s=40.0)))


def gated_model(play: Play) -> Verdict:
    """The model is gated, and there is no token."""
    return _fault("gated-model", play)


def missing_model(play: Play) -> Verdict:
    """The hub has no such model."""
    return _fault("missing-model", play)


def wrong_argument(play: Play) -> Verdict:
    """The vLLM in the image does not know an argument of the profile."""
    return _fault("wrong-argument", play)


def missing_image(play: Play) -> Verdict:
    """The registry has no such image."""
    return _fault("missing-image", play)


def private_image(play: Play) -> Verdict:
    """The registry wants a login for the image."""
    return _fault("private-image", play)


def credit(play: Play) -> Verdict:
    """The credit ends for a quarter of an hour while a machine loads, and is there again."""
    gone: list[float] = []

    def end_it(fleet: Fleet, passed: float) -> None:
        shown = fleet.ask(f"{fleet.cloud}/localcloud/status") or {}
        if not gone and any(i["state"] == "running" for i in shown.get("instances", [])):
            gone.append(passed)
            fleet.ask(f"{fleet.cloud}/localcloud/faults", {"name": "credit-zero", "seconds": 15})

    return _no_waste(play(Day(only=(), machines=_GOOD, act=end_it, most_s=90.0)), 1)


def bandwidth(play: Play) -> Verdict:
    """Each byte of image and model is billed, at $10 a TB."""
    dear = [_card(n, 0.45, inet_usd_gb=0.01) for n in (1, 2)]
    return _books(play(Day(only=("bandwidth",), machines=dear)), 1)


def stopped_storage(play: Play) -> Verdict:
    """The disk of a stopped machine costs three times as much, and it is stopped as soon as it was hot."""
    dear = [_card(n, 0.45, storage_usd_gb_month=9.0) for n in (1, 2)]
    stopped: list[float] = []

    def stop_it(fleet: Fleet, passed: float) -> None:
        shown = fleet.ask(f"{fleet.autoscaler}/instances") or {}
        if not stopped and any(i["state"] == "hot" for i in shown.get("instances", [])):
            stopped.append(passed)
            params = {"hot": 0, "total": 1}
            fleet.ask(f"{fleet.autoscaler}/policy", {"name": "fixed", "params": params}, "PUT")

    day = Day(only=("stopped_storage",), machines=dear, act=stop_it, whole=True, most_s=45.0)
    return _books(play(day), 1)


def spend_limit_usd_h(play: Play) -> Verdict:
    """A new account may spend $10 an hour, and every machine is dearer: that is said."""
    dear = [_card(n, 12.0) for n in (1, 2)]
    rich = ("--max-dollars-per-hour", "50")
    outcome = play(Day(only=("spend_limit_usd_h",), machines=dear, most_s=25.0, autoscaler=rich))
    kinds = [str(hold["kind"]) for hold in outcome.health.get("holds") or []]
    right = not outcome.rented and not outcome.banned and "spend-limit" in kinds
    return Verdict(right, f"{outcome.says()}, held: {', '.join(kinds) or 'nothing'}")


def contract_ends(play: Play) -> Verdict:
    """The contract of the first machine ends within the hour: another is hot by then."""
    ends = ("contract-ends:in_s=40,count=1",)
    day = Day(only=("contract_ends",), machines=_GOOD, faults=ends, whole=True, most_s=80.0)
    outcome = play(day)
    right = outcome.last_hot == 1 and len(outcome.rented) == 2 and not outcome.banned
    return Verdict(right, f"{outcome.says()}, {outcome.last_hot} hot at the end")


def price_increase(play: Play) -> Verdict:
    """The only machine's host asks for 40 % more, or the contract ends: it must be heard."""
    asks = ("price-increase:share=0.4,count=1", "contract-ends:in_s=45,count=1")
    day = Day(
        only=("price_increase", "contract_ends"),
        machines=[_card(1, 0.45, slots=1)],
        faults=asks,
        whole=True,
        most_s=85.0,
    )
    outcome = play(day)
    well = _no_waste(outcome, 1)
    return Verdict(well.right and outcome.last_hot == 1, f"{well.figures}, {outcome.last_hot} hot at the end")


def no_card(play: Play) -> Verdict:
    """The credit is gone for three days, half a minute here; machines are deleted, others follow."""
    gone: list[float] = []

    def end_it(fleet: Fleet, passed: float) -> None:
        shown = fleet.ask(f"{fleet.autoscaler}/instances") or {}
        if not gone and any(i["state"] == "hot" for i in shown.get("instances", [])):
            gone.append(passed)
            fleet.ask(f"{fleet.cloud}/localcloud/faults", {"name": "credit-zero", "seconds": 36})

    day = Day(only=("no_card",), machines=_GOOD, speedup=7_200.0, act=end_it, whole=True, most_s=90.0)
    outcome = play(day)
    right = outcome.last_hot == 1 and not outcome.banned
    return Verdict(right, f"{outcome.says()}, {outcome.last_hot} hot at the end")


ROWS: Mapping[str, Callable[[Play], Verdict]] = MappingProxyType(
    {
        row.__name__: row
        for row in (
            *(ssh_greeting, ssh_tmux, ssh_key_lag_s, ssh_keys_lost, ssh_refused, host_gives_up),
            *(kind, script_bytes, old_drivers, foreign_cpus, sizes, big_market),
            *(renters, price_moves, offers_vanish, rate_limits),
            *(bandwidth, stopped_storage, spend_limit_usd_h, contract_ends, price_increase, no_card),
            *(gated_model, missing_model, wrong_argument, missing_image, private_image, credit),
        )
    }
)

MET_BEFORE = frozenset(
    {"kind", "ssh_key_lag_s", "stopped_storage", "renters", "price_moves", "offers_vanish", "rate_limits"}
)
"""Rows in which 0abccd6 does right, too: it had met them as faults (start-waits, create-410, rate-limits), or
read it from the listing (what a stopped machine costs)."""
