"""The flags of sim.py for a live run, one against servers that really run."""

from dataclasses import dataclass
from pathlib import Path

from engine.profiles import get_profile
from fleet_client.flags import check_flags, flag, within
from fleet_client.network_trust import InTheClear, clear_call
from process.errors import ConfigError
from simulation.live.stack_config import ENGINES
from simulation.live.workload import Workload
from simulation.report_file import check_output
from simulation.traces.time_units import AUTO, UNITS

MOST_DRAWS = 1e8
"""Largest users × rounds × schedule: all requests of the run are drawn before it begins, one draw for
each."""


@dataclass(frozen=True)
class SimConfig(Workload):
    """The flags of a live run: what is sent, where to, and what is done with the report.

    manage: whether the autoscaler shall start and stop instances meanwhile; None leaves its flag as it is.
    needs_autoscaler: its URL was named on the command line, so that it is an error when it does not answer.
    """

    manage: bool | None = flag(
        None, "have the autoscaler manage the fleet, or not, for the run", shown="as it is"
    )
    loadbalancer: str = flag("http://127.0.0.1:8200", "where the loadbalancer is", metavar="URL")
    autoscaler: str = flag("http://127.0.0.1:8100", "where the autoscaler is", metavar="URL")
    needs_autoscaler: bool = False
    state_dir: Path | None = flag(
        None,
        "directory of the control key",
        metavar="DIR",
        shown="~/.local/state/autoscaler-py/fleet; with --local a temporary one",
    )
    client_key_file: Path | None = flag(None, "file of a key of the loadbalancer's clients, mode 0600")
    loadbalancer_cert: Path | None = flag(
        None,
        "certificates that an https loadbalancer may show, PEM, and no others",
        shown="what this machine's authorities vouch for",
    )
    autoscaler_cert: Path | None = flag(
        None, "the same of an https autoscaler", shown="what this machine's authorities vouch for"
    )
    trust_network: bool = flag(
        False,
        "speak plain HTTP beyond this machine, too: all who can listen there have the keys, and with the "
        "control key the fleet",
    )
    trace: Path | None = flag(
        None, "send the requests of this log at its times, instead of drawn ones (simulation/traces/logs.py)"
    )
    time_unit: str = flag(
        AUTO, "with --trace: of times in the log that are numbers and do not say it", choices=(AUTO, *UNITS)
    )
    json: Path | None = flag(None, "write the report to this file, as JSON")
    html: Path | None = flag(None, "write the report to this file, as a page that needs nothing else")
    local: bool = flag(False, "start everything on this machine, and end it after the run")
    engine: str = flag("paced", "with --local: what answers", choices=tuple(ENGINES))
    instances: int = flag(
        4, "with --local: stopped instances prepared first", unit="instances", shown="4; with vllm 2"
    )
    speedup: float = flag(
        60.0, "with --local: times of the cloud, not of real vLLM, are divided by it", unit="factor"
    )
    quiet: bool = flag(False, "print no progress, only the report")

    def in_the_clear(self) -> list[InTheClear]:
        """Return which calls of this run would go over a network unencrypted."""
        return [
            *clear_call("--loadbalancer", self.loadbalancer, "the keys and the leases"),
            *clear_call("--autoscaler", self.autoscaler, "the control key, and with it the fleet"),
        ]

    def checked(self) -> "SimConfig":
        """Return the configuration unchanged; raise a ConfigError with the flag, the value and the range."""
        longest = get_profile(self.model).max_model_len
        check_flags(self)
        within("--prompt-tokens", self.prompt_tokens, 1.0, longest)
        within("--max-tokens", self.max_tokens, 1.0, longest)
        if self.prompt_tokens + self.max_tokens > longest:
            raise ConfigError(
                f"--prompt-tokens {self.prompt_tokens:g} and --max-tokens {self.max_tokens:g}: "
                f"wanted at most {longest} together, the context of {self.model}"
            )
        if self.base_num_users * self.num_iterations * max(self.load_schedule) > MOST_DRAWS:
            raise ConfigError("--base-num-users × --num-iterations: wanted at most 100 million draws in all")
        check_output("--json", self.json)
        check_output("--html", self.html)
        return self
