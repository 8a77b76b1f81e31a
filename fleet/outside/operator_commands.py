"""What an operator asks of a running autoscaler on the command line: how it stands, and what is done by hand.

Each command is a call or two of the routes that the operator's page uses, so both do and show the same.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fleet.outside.operator_ssh import FOLLOW_LOG, run_ssh
from fleet_client import private_files
from fleet_client.flags import flag, server_url
from fleet_client.network_trust import allow, clear_call
from fleet_client.own_tls import TrustedServer
from process.errors import ConfigError
from process.safe_text import safe_text

ASK_TIMEOUT_S = 15.0
"""Seconds for an answer: one over a week of a large ledger takes a few."""

WATCH_EVERY_S = 2.0
"""Seconds between two looks of `status --watch`."""

DECISIONS_SHOWN = 12

WIDE = 200
"""Columns of a table that goes to a file or a program."""

SHOW = {
    "status": "every instance, and how the fleet stands",
    "decisions": "the newest decisions as sentences, with their evidence",
    "costs": "what today and yesterday cost, by what the dollars were spent on",
}
"""Commands that show something -> what."""

REACH = {
    "logs": "follow an instance's engine log, over the operator's own ssh (it may quote prompts)",
    "ssh": "a shell on an instance",
}
"""Commands that go to an instance past the autoscaler -> what they do."""

ACT = {
    "drain": "let an instance's requests end, then stop it",
    "replace": "the same, but destroy it in the end and rent another in its place",
    "destroy": "end an instance at once, with its disk and its requests",
    "ban": "rent that machine no more for a day",
    "forgive": "rent a machine again that failed or was banned",
}
"""Commands that act on an instance, or on a machine by its machine id -> what they do."""

SWITCH = {"manage": "order new machines and starts again, also what was held after a mended fault; or do not"}
"""The switch for orders -> what it does."""

MACHINES = frozenset({"ban", "forgive"})


@dataclass(frozen=True)
class OperatorConfig:
    """Where the autoscaler is, and how it is asked."""

    autoscaler: str = flag("http://127.0.0.1:8100", "the autoscaler that is asked", metavar="URL")
    autoscaler_cert: Path | None = flag(
        None,
        "PEM file with the certificate that the autoscaler shows (its --tls-cert)",
        shown="what the machine's authorities vouch for",
    )
    operator_key_file: Path | None = flag(
        None, "file with the operator's key, mode 0600", shown="none, as on loopback"
    )
    trust_network: bool = flag(False, "allow plain HTTP beyond this machine")
    json: bool = flag(False, "print the answer as JSON")
    watch: bool = flag(False, "show it again every two seconds, until Ctrl-C (status)")
    state_dir: Path | None = flag(
        None,
        "directory with the fleet's ssh key (logs, ssh)",
        metavar="DIR",
        shown="~/.local/state/autoscaler-py/LABEL",
    )


def wide_console() -> Console:
    """Return a console for tables: as wide as the terminal, and wide where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


class AutoscalerCaller:
    """Calls the operator's routes of one autoscaler."""

    def __init__(self, config: OperatorConfig) -> None:
        """Read the key; raise ConfigError where it, or the way, is not to be used."""
        self._url = server_url("--autoscaler", config.autoscaler)
        way = clear_call("--autoscaler", self._url, "the operator's key and the fleet")
        allow(way, trust_network=config.trust_network)
        keys = private_files.load_named_keys(config.operator_key_file)
        self._key = next(iter(keys), None)
        self._trusted = TrustedServer("--autoscaler-cert", config.autoscaler_cert)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer of one route; raise ConfigError with what was said instead."""
        request = urllib.request.Request(f"{self._url}{path}", method=method)  # noqa: S310 http(s) only
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        if body is not None:
            request.data = json.dumps(body).encode()
        # The key goes to that server only: past no proxy, and after no redirect.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=self._trusted.context()),
            _NoRedirect,
        )
        try:
            with opener.open(request, timeout=ASK_TIMEOUT_S) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as e:
            raise ConfigError(f"{self._url} answers {e.code}: {_message(e.read())}") from e
        except (OSError, ValueError) as e:
            raise ConfigError(f"{self._url} does not answer: {e}") from e
        if not isinstance(found, dict):
            raise ConfigError(f"{self._url} is no autoscaler: it answers {str(found)[:40]!r}")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for the error that it is: our servers send none."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def _message(raw: bytes) -> str:
    try:
        return safe_text(str(json.loads(raw)["message"]))
    except (ValueError, LookupError, TypeError):
        return "no reason given"


def run_operator_command(
    command: str, of: int | str | None, config: OperatorConfig, console: Console | None = None
) -> None:
    """Carry out one of these commands and print what came of it; raise ConfigError when it was not done.

    of: id of the instance, for ban and forgive of the machine, for manage "on" or "off".
    """
    caller = AutoscalerCaller(config)
    console = console or wide_console()
    if command in REACH:
        raise SystemExit(_reach(caller, command, int(of or 0), config))
    if command in SWITCH:
        said = caller.ask("PUT", "/manage", {"manage": of == "on"})
        _print(console, said, config, [f"manage: {of}"])
        return
    if command in ACT:
        path = f"/{'machines' if command in MACHINES else 'instances'}/{of}/{command}"
        said = caller.ask("POST", path, {} if command == "ban" else None)
        _print(console, said, config, [f"{command}: {', '.join(f'{k} {v}' for k, v in said.items())}"])
        return
    while True:
        said = caller.ask("GET", "/overview")
        if config.watch and not config.json:
            console.clear()
        _print(console, SHOWN[command](said), config, PAGES[command](said))
        if not config.watch:
            return
        time.sleep(WATCH_EVERY_S)


def _reach(caller: AutoscalerCaller, command: str, number: int, config: OperatorConfig) -> int:
    rows = caller.ask("GET", "/instances")["instances"]
    row = next((i for i in rows if i["id"] == number), None)
    label = caller.ask("GET", "/overview")["fleet"]["label"]
    folder = config.state_dir or private_files.default_state_dir(label)
    return run_ssh(number, row, folder / "ssh_ed25519", FOLLOW_LOG if command == "logs" else None)


def _print(console: Console, said: Any, config: OperatorConfig, page: Iterable[Any]) -> None:
    if config.json:
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        return
    for part in page:
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def _status(o: Mapping[str, Any]) -> list[Any]:
    latest = o["latest"] or {}
    health = "well" if o["health"].get("status") == "ok" else f"NOT WELL: {o['health']['message']}"
    in_time = "nothing arrived" if o["in_time"] is None else f"{o['in_time']:.2%} in time"
    head = (
        f"{o['fleet']['label']}, {o['fleet']['model']}: {latest.get('hot', 0)} hot of "
        f"{latest.get('wanted_hot', 0)} wanted, load {latest.get('offered', 0.0):.2f}, "
        f"{latest.get('held', 0)} waiting, {in_time}, ${latest.get('usd_h', 0.0):.3f}/h of "
        f"${o['limits']['usd_h']:.2f}, today ${o['money']['today']['total']:.4f}, {health}"
    )
    columns = ("instance", "machine", "state", "since", "GPU", "$/h", "requests", "failures", "why")
    rows = [
        (
            str(i["id"] or "ordered"),
            str(i["machine_id"] or "?"),
            i["state"] + (f", {i['taken_out']} asked" if i["taken_out"] else ""),
            f"{i['seconds_in_state']:.0f} s",
            f"{i['num_gpus']} x {i['gpu_name']}",
            f"{i['price_usd_h']:.4f}",
            str(i["requests"]),
            str(i["failures"]),
            i["why"],
        )
        for i in o["instances"]
    ]
    bans = [
        f"machine {b['machine']} is not rented until {_moment(b['until'])}: {b['evidence']}"
        for b in o["bans"]
    ]
    return [head, _table(columns, rows), *bans]


def _moment(at_s: float) -> str:
    return time.strftime("%d %b %H:%M:%S", time.localtime(at_s))


def _decisions(o: Mapping[str, Any]) -> list[str]:
    lines = [f"{_moment(a['at'])}  {a['who']}: {a['did']}" for a in o["acts"][:DECISIONS_SHOWN]]
    for d in o["decisions"][:DECISIONS_SHOWN]:
        lines.append(f"{time.strftime('%H:%M:%S', time.localtime(d['at']))}  {d['sentence']}")
        for order in d["orders"]:
            evidence = f" [{order['evidence']}]" if order.get("evidence") else ""
            lines.append(f"          {order['do']} {order.get('label', '')}: {order['why']}{evidence}")
    return lines


def _costs(o: Mapping[str, Any]) -> list[Any]:
    money = o["money"]
    rows = [
        (kind.replace("_", " "), f"{money['today'][kind]:.4f}", f"{money['yesterday'][kind]:.4f}")
        for kind in money["today"]
    ]
    return [_table(("spent on", "today, $", "yesterday, $"), rows)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1])
    for row in rows:
        table.add_row(*(safe_text(cell) for cell in row))
    return table


PAGES = {"status": _status, "decisions": _decisions, "costs": _costs}
"""Command -> what it prints of GET /overview."""

SHOWN = {"status": dict, "decisions": lambda o: o["decisions"], "costs": lambda o: o["money"]}
"""Command -> what it prints of GET /overview as JSON."""
