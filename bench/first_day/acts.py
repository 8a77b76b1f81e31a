"""The acts of the first day, in their order: what is done, what happens, and what must be seen."""

import json
import math
import re
import shlex
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.children import ChildProcess, wait_for
from bench.first_day.documented import documented_steps
from bench.first_day.ideal import DayPlayed
from bench.first_day.stage import COMMAND_S, Ended, Stage
from engine.profiles import get_profile
from fleet.outside.ledger import Ledger
from fleet.what_if import requests_of

KEY = "first-day-key-of-an-operator"
KEY_FILE = ".config/vastai/vast_api_key"
CREDIT_USD = 25.0
MODEL = "vllm-13"
TOKEN, WRONG_TOKEN = "hf_first_day_right", "hf_first_day_wrong"
"""Of the hub, for the model, which is gated on this day."""

CLOUD = ("--fault", f"gated-model:model={get_profile(MODEL).model},token={TOKEN}")
"""More flags of the local cloud."""

CONTRACT_S = 60.0
"""Seconds before its end in which the cloud says that a contract ends: an hour of the cloud."""

REQUESTS_S = 0.5
"""Requests a second: about a fifth of what one machine can do."""

STEPS = documented_steps()


class FirstDay:
    """What has happened so far, and what was measured."""

    def __init__(self, on: Stage, hours: float) -> None:
        """Begin the day. hours: of the cloud, while the fleet serves."""
        self.on = on
        self.hours = hours
        self.began = time.monotonic()
        self.trouble: list[str] = []
        self.measured: dict[str, Any] = {}
        self.offers: list[Mapping[str, Any]] = []  # the best first
        self.spent_usd = 0.0
        self.lost = 0
        self.arrived: tuple[tuple[float, int, int], ...] = ()
        self.report = on.root / "users.json"
        self._asking: Future[Ended]
        self._asked_at = 0.0

    # -- what an act does ------------------------------------------------------------------------------

    def command(self, step: str, number: int = 0) -> str:
        """Return a command of the page."""
        return STEPS[step].shell[number]

    def expect(self, what: str, so: object) -> None:
        """Note a trouble where that does not hold."""
        if not so:
            print(f"   NOT SO: {what}", flush=True)
            self.trouble.append(what)

    def run(
        self, command: str, *, given: str = "", python: str = "", status: int = 0, says: str = ""
    ) -> Ended:
        """Run a command to its end; it must end with that status, and say what matches."""
        done = self.on.run(command, given=given, python=python)
        last = " | ".join(done.out.strip().splitlines()[-2:])
        print(f"   {command[:100]} -> {done.status}: {last[:200]}", flush=True)
        self.expect(f"{command}: status {done.status}, wanted {status}", done.status == status)
        if says:
            self.expect(f"{command}: says {says!r}", re.search(says, done.out))
        return done

    def cloud_minutes(self, seconds: float) -> float:
        """Return seconds here as minutes of the cloud."""
        return seconds * self.on.speedup / 60.0

    @property
    def state_dir(self) -> Path:
        """The fleet's state directory."""
        return Path(self.on.environ["HOME"]) / ".local" / "state" / "autoscaler-py" / "fleet"

    def overview(self) -> Mapping[str, Any]:
        """Return what the autoscaler's page shows."""
        found: Mapping[str, Any] = self.on.ask(f"{self.on.autoscaler_url}/overview")
        return found

    def health(self) -> Mapping[str, Any]:
        """Return what the autoscaler says of itself."""
        found: Mapping[str, Any] = self.on.ask(f"{self.on.autoscaler_url}/health")
        return found

    def hot(self) -> list[Mapping[str, Any]]:
        """Return the instances that are hot."""
        rows = self.on.ask(f"{self.on.autoscaler_url}/instances")["instances"]
        return [row for row in rows if row["state"] == "hot"]

    def rentals(self) -> list[Mapping[str, Any]]:
        """Return what the cloud has rented out to the account."""
        return list(self.on.bill()["instances"])

    def let_users_ask(self) -> None:
        """Have users ask from now on until the day's hours are over, whatever happens meanwhile."""
        seconds = max(1, round(self.hours * 3600.0 / self.on.speedup))
        self.report, ports = self.on.root / "users.json", self.on.environ
        command = (
            f"python sim.py --num-iterations {seconds} --round-s 1 --base-num-users 1 --load-schedule 1"
            f" --request-probability {REQUESTS_S:g} --seed 1 --json {self.report} --quiet"
            f" --loadbalancer http://127.0.0.1:{ports['LOADBALANCER_PORT']}"
            f" --autoscaler http://127.0.0.1:{ports['AUTOSCALER_PORT']}"
        )
        self._asking = ThreadPoolExecutor(1).submit(self.on.run, command, limit_s=seconds + COMMAND_S)
        self._asked_at = time.monotonic()

    def wait_until(self, share: float) -> None:
        """Wait until that share of the day's hours is over."""
        at = self._asked_at + share * self.hours * 3600.0 / self.on.speedup
        time.sleep(max(0.0, at - time.monotonic()))

    def hear_users(self) -> None:
        """Wait for the last answer, and hold what users met against what may be."""
        done = self._asking.result()
        self.expect(f"users: {done.out[-300:]}", done.status == 0 and self.report.exists())
        said = json.loads(self.report.read_text())
        requests, met = said["requests"], said["objective"]["met_share"]
        print(f"   users: {requests['completed']} of {requests['sent']}, {met:.1%} in time", flush=True)
        self.expect(f"{requests['failed']} of {requests['sent']} requests failed", requests["failed"] == 0)
        self.measured["users"] = {"requests": requests, "met_share": met}

    # -- what was measured -----------------------------------------------------------------------------

    def note_offers(self, offers: list[Mapping[str, Any]]) -> None:
        """Keep what the market had when the day began, the best first."""
        self.offers = offers

    def note_lost(self, machine: int) -> None:
        """Note that the host of that machine was lost."""
        self.lost = machine

    def count(self, arrived: tuple[tuple[float, int, int], ...], spent: Mapping[str, float]) -> None:
        """Take in all requests of the day, and what the cloud charged for it."""
        self.arrived, self.spent_usd = arrived, spent["total"]
        self.measured["spent"] = spent

    def played(self) -> DayPlayed:
        """Return the day as the clairvoyant knows it."""
        # It knows which host will be lost, and takes the best of the others.
        lost = {one["host"] for one in self.offers if one["machine"] == self.lost}
        c = next(one for one in self.offers if one["host"] not in lost)
        return DayPlayed(
            profile=MODEL,
            speedup=self.on.speedup,
            gpu_name=c["gpu_name"],
            num_gpus=c["num_gpus"],
            usd_h=c["usd_h"],
            stopped_usd_h=c["stopped_usd_h"],
            download_usd=c["download_usd"] or 0.0,
            arrived=self.arrived,
        )

    def figures(self) -> dict[str, Any]:
        """Return all that was measured."""
        return {"spent_usd": self.spent_usd, "trouble": self.trouble, **self.measured}


# -- the acts ------------------------------------------------------------------------------------------


def right_key(day: FirstDay) -> None:
    """The operator sets the key."""
    for number in (1, 2):
        day.run(day.command("The key", number), given=f"{KEY}\n")
    day.on.use_key((Path(day.on.environ["HOME"]) / KEY_FILE).read_text().strip())


def a_key_that_lacks_a_permission(day: FirstDay) -> None:
    """The key may not write: the first command that needs it says so, and nothing is rented."""
    day.on.fault("key-lacks", permission="user_write")
    day.run(day.command("Load the model"), status=2, says="user_write")
    day.on.heal("key-lacks")
    day.expect("nothing is rented", day.rentals() == [])


def no_token(day: FirstDay) -> None:
    """The model is gated, and there is no token: that is said before anything is rented."""
    day.run(day.command("What it would cost"), says="is gated")
    day.run(day.command("Load the model"), status=2, says="secrets set HF_TOKEN")
    day.expect("nothing is rented", day.rentals() == [])


def a_wrong_token(day: FirstDay) -> None:
    """The operator sets a wrong token, and is told; then the right one."""
    command = day.command("The token, if the model is gated")
    day.run(command, given=f"{WRONG_TOKEN}\n")
    day.run(day.command("Load the model"), status=2, says="refuses the account's HF_TOKEN")
    day.expect("nothing is rented", day.rentals() == [])
    day.run(command, given=f"{TOKEN}\n")


def see_before_renting(day: FirstDay) -> None:
    """A plan shows what that would cost, and rents nothing."""
    command = day.command("What it would cost")
    day.run(command, says=r"prepare --count 2: \$")
    said = json.loads(day.on.run(f"{command} --json").out)
    day.note_offers(said["offers"])
    day.measured["planned_usd_to_set_up"] = sum(one["usd_to_set_up"] for one in said["taken"])
    day.expect("a plan rents nothing", day.rentals() == [])


def load_the_model(day: FirstDay) -> None:
    """Two machines load the model and are stopped."""
    done = day.run(day.command("Load the model"), says="2 instances are stopped with")
    day.measured["prepare_cloud_min"] = round(day.cloud_minutes(done.seconds), 1)
    machines = [row["machine_id"] for row in day.rentals()]
    day.expect(f"two machines are rented: {machines}", len(set(machines)) == len(machines) == 2)


def serve(day: FirstDay) -> None:
    """Autoscaler, loadbalancer and gateway run; a machine is hot."""
    _serve_autoscaler(day)
    for number in (1, 2):
        name = shlex.split(day.command("Serve", number))[1]
        server = day.on.serve(day.command("Serve", number))
        _up(name, server)
    took_s = day.on.wait("an instance is hot", lambda: day.hot())
    day.measured["to_hot_cloud_min"] = round(day.cloud_minutes(took_s), 1)


def _up(name: str, server: ChildProcess) -> None:
    wait_for(name, server, lambda: "http" in server.log.read_text())


def _serve_autoscaler(day: FirstDay, **changed: str) -> None:
    command = day.command("Serve", 0)
    for flag, value in changed.items():
        name = "--" + flag.replace("_", "-")
        command, found = re.subn(rf"{name} \S+", f"{name} {value}", command)
        assert found, f"{name} is not in the page's command"
    server = day.on.serve(command)
    _up("autoscaler", server)
    day.on.wait("the autoscaler answers", day.health)


def first_answer(day: FirstDay) -> None:
    """A real client calls a tool."""
    ended = day.run("the page's program", python=STEPS["Ask"].python, says="weather")
    day.measured["to_first_answer_cloud_min"] = round(day.cloud_minutes(time.monotonic() - day.began), 1)
    day.expect("the answer is the tool's name", ended.out.strip().endswith("weather"))


def users_come(day: FirstDay) -> None:
    """Users ask, from now to the end of the day."""
    day.let_users_ask()


def a_host_is_lost(day: FirstDay) -> None:
    """The host of the machine that serves vanishes under its users, and another machine takes over."""
    day.wait_until(0.15)
    lost = day.hot()[0]
    day.on.fault("offline", instance_id=lost["id"])
    took_s = day.on.wait("another is hot", lambda: any(row["id"] != lost["id"] for row in day.hot()))
    day.measured["host_lost_to_hot_cloud_min"] = round(day.cloud_minutes(took_s), 1)
    day.note_lost(lost["machine_id"])


def a_contract_ends(day: FirstDay) -> None:
    """The contract of the machine that serves comes to its end: another one serves before it does."""
    day.wait_until(0.35)
    ending = day.hot()[0]
    day.on.fault("contract-ends", instance_id=ending["id"], in_s=CONTRACT_S)
    took_s = day.on.wait("another is hot", lambda: any(row["id"] != ending["id"] for row in day.hot()))
    day.measured["contract_replaced_cloud_min"] = round(day.cloud_minutes(took_s), 1)
    day.expect("it is replaced before the end", took_s < CONTRACT_S)
    day.on.wait("the old one is gone", lambda: ending["id"] not in {one["id"] for one in day.rentals()})


def credit_ends(day: FirstDay) -> None:
    """The credit is used up: everything stops, and nobody is blamed; then it is paid, and all goes on."""
    day.wait_until(0.55)
    before = {row["id"] for row in day.rentals()}
    day.on.fault("credit-zero")
    day.on.wait("it is said that there is no credit", lambda: "credit" in json.dumps(day.health()))
    day.on.wait("nothing is hot", lambda: not day.hot())
    day.on.heal("credit-zero")
    took_s = day.on.wait("a machine is hot again", lambda: day.hot())
    day.measured["credit_back_to_hot_cloud_min"] = round(day.cloud_minutes(took_s), 1)
    day.expect("the same machines go on", {row["id"] for row in day.rentals()} >= before)


def budget_is_reached(day: FirstDay) -> None:
    """The day's budget is spent: the machines are stopped; with a higher one all goes on."""
    day.wait_until(0.7)
    day.on.end("autoscaler_server.py")
    spent = day.on.bill()["spent_usd"]["total"]
    _serve_autoscaler(day, budget_usd_day=f"{spent:.4f}")
    day.on.wait("it is said that the budget is spent", lambda: "budget" in json.dumps(day.health()))
    day.on.wait("nothing is hot", lambda: not day.hot())
    day.on.end("autoscaler_server.py")
    _serve_autoscaler(day)
    day.on.wait("a machine is hot again", lambda: day.hot())


def what_it_costs(day: FirstDay) -> None:
    """The day is over; status and costs are looked at."""
    day.hear_users()
    day.run(day.command("What it costs", 0))
    day.run(day.command("What it costs", 1))
    ours = day.on.ask(f"{day.on.autoscaler_url}/costs")
    day.measured["ledger_usd"] = ours["total_usd"] if "total_usd" in ours else ours.get("usd")
    day.measured["bans"] = day.overview()["bans"]
    banned = {one["machine"] for one in day.measured["bans"]}
    day.expect(f"only the machine whose host was lost is not rented: {banned}", banned <= {day.lost})


def the_end(day: FirstDay) -> None:
    """Everything is ended; the day is counted."""
    for name in ("gateway.py", "loadbalancer_server.py", "autoscaler_server.py"):
        day.on.end(name)
    ledger = Ledger(day.state_dir / "ledger.sqlite")
    arrived = ledger.arrived(0.0, math.inf)
    ledger.close()
    day.run(day.command("The end"), given="yes\n")
    day.expect("nothing is left", day.rentals() == [])
    requests = tuple(requests_of(arrived, get_profile(MODEL).prefill_weight))
    day.count(requests, day.on.bill()["spent_usd"])


ACTS: tuple[Callable[[FirstDay], None], ...] = (
    right_key,
    a_key_that_lacks_a_permission,
    no_token,
    a_wrong_token,
    see_before_renting,
    load_the_model,
    serve,
    first_answer,
    users_come,
    a_host_is_lost,
    a_contract_ends,
    credit_ends,
    budget_is_reached,
    what_it_costs,
    the_end,
)
