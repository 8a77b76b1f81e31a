"""Everything an operator may set of the autoscaler, and where the key of a local cloud is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.profile import Profile
from engine.profiles import PROFILES
from fleet.outside.market_flags import MarketFlags
from fleet_client import private_files
from fleet_client.flags import check_flags, flag, server_url
from fleet_client.network_trust import InTheClear, clear_bind, clear_call
from fleet_client.own_tls import scheme
from policies import POLICIES, Policy, make_policy, parse_params
from process.errors import ConfigError
from vast.account_secrets import RegistryLogin
from vast.settings import VastSettings, find_api_key

PRODUCTION_URL = "https://console.vast.ai"
"""The service that the vastai command asks unless it is told another (vast-contract 0)."""

SERVE_ONLY = frozenset(
    {
        "host",
        "loadbalancer",
        "manage",
        "policy",
        "policy_param",
        "goal",
        "replay_every_s",
        "operator_key_file",
        "loadbalancer_cert",
        "trust_network",
        "notify",
        "notify_file",
        "notify_every_s",
    }
)
"""Fields that only `serve` needs; the others are for `prepare` and `destroy-fleet`, too."""


def holds_secret(url: str) -> bool:
    """Return whether a URL of --notify may hold a secret: all but plain webhooks of a host and a port."""
    return not re.fullmatch(r"(json|form|xml)s?://[A-Za-z0-9.-]+(:\d{1,5})?/?", url)


@dataclass(frozen=True)
class AutoscalerConfig(MarketFlags):
    """The settings of an autoscaler that an operator may give. Times in seconds, money in $ per hour."""

    model: str = flag(
        "vllm-13", f"profile of the model that is served, one of {', '.join(PROFILES)}", metavar="NAME"
    )
    profiles: Path | None = flag(
        None,
        "file of your own model profiles, TOML (docs/models.md)",
        shown="profiles.toml here, or in the state directory",
    )
    # Nothing but instances with this label is ever touched.
    label: str = flag(
        "fleet",
        "name of the fleet: its instances are called LABEL/…, and no other is ever touched",
        metavar="LABEL",
    )
    state_dir: Path | None = flag(
        None,
        "directory of keys, ledger and vastai's configuration",
        metavar="DIR",
        shown="~/.local/state/autoscaler-py/LABEL",
    )
    local: bool = flag(False, "rent from a localcloud instead of Vast.ai")
    public_url: str | None = flag(
        None, "this server as instances reach it, so that they say when they are ready", metavar="URL"
    )
    cloud_url: str = flag("http://127.0.0.1:8500", "where the localcloud is", metavar="URL")
    speedup: float = flag(
        1.0,
        "the localcloud's --speedup: deadlines and times of policies are divided by it",
        least=1.0,
        most=10_000.0,
        unit="factor",
    )
    max_instances: int = flag(
        8, "hard limit on instances, stopped ones counted", least=1, most=10_000, unit="instances"
    )
    max_dollars_per_hour: float = flag(
        10.0,
        "hard limit on what all instances cost together",
        least=0.0,
        most=100_000.0,
        metavar="USD",
        unit="$/h",
    )
    budget_usd_day: float | None = flag(
        None,
        "what the fleet may cost a day (UTC), traffic included; at 80 % people are told, and only what still "
        "fits is rented; at 100 % nothing is rented or started, and hot instances drain and stop until the "
        "next day",
        least=0.0,
        most=1e7,
        metavar="USD",
        unit="$",
        shown="none",
    )
    budget_usd_month: float | None = flag(
        None, "the same for a month (UTC)", least=0.0, most=1e8, metavar="USD", unit="$", shown="none"
    )
    min_credit_hours: float = flag(
        1.0,
        "nothing is rented while the account's credit lasts for fewer hours at the present rate",
        least=0.0,
        most=10_000.0,
        unit="h",
    )
    # One listing each; the CLI takes 0.5 s of processor a call.
    poll_interval_s: float = flag(5.0, "seconds between listings", least=0.5, most=600.0)
    check_hot_every_s: float = flag(
        15.0, "seconds between test prompts to a hot instance", least=0.5, most=3600.0
    )
    check_boot_every_s: float = flag(
        5.0, "seconds between checks of a booting or draining instance", least=0.5, most=600.0
    )
    # ssh and prompt together.
    check_timeout_s: float = flag(15.0, "seconds for one health check in all", least=1.0, most=300.0)
    registry_login: Path | None = flag(
        None,
        "file with the login to the registry of a private image, mode 0600: USER PASSWORD [REGISTRY]; every "
        "host that is rented gets it",
        metavar="FILE",
        shown="none: the image is public",
    )
    reach: tuple[str, ...] = flag(
        (),
        "a place whose port shows that our own network works, before machines that do not answer are given "
        "up; may be repeated",
        metavar="HOST:PORT",
        shown="the cloud itself",
    )
    host: str = flag("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = flag(8100, "port to listen on", least=1, most=65535)
    loadbalancer: tuple[str, ...] = flag(
        ("http://127.0.0.1:8200",),
        "a loadbalancer, which is told the hot set; may be repeated",
        metavar="URL",
    )
    manage: bool = flag(True, "start, stop, create and destroy instances, or only watch them")
    policy: str = flag(
        "objective", f"what says how many instances are hot, one of {', '.join(POLICIES)}", metavar="NAME"
    )
    policy_param: tuple[str, ...] = flag(
        (),
        "a parameter of the policy; may be repeated",
        metavar="NAME=NUMBER",
        shown="the policy's own",
    )
    goal: float | None = flag(
        None,
        "short for --policy objective --policy-param goal=SHARE: the share of requests that shall be in "
        "time, as 0.99",
        metavar="SHARE",
        shown="the policy's own",
    )
    replay_every_s: float = flag(
        1800.0,
        "seconds from one replay of the last day, which sets the level of a policy with a goal, to the next; "
        "0: none",
        least=0.0,
        most=86_400.0,
    )
    operator_key_file: Path | None = flag(
        None,
        "file of keys that the operator's routes then want, one a line, mode 0600",
        shown="open on loopback",
    )

    notify: tuple[str, ...] = flag(
        (),
        "where people are told when something begins to be wrong, and when it is over, as apprise writes it "
        "(slack://…, mailto://…, json://HOST:PORT); may be repeated. It holds a secret, and so belongs into "
        "the environment, the file of --config (mode 0600) or that of --notify-file: on the command line "
        "only json, form and xml with host and port are taken",
        metavar="URL",
        secret=holds_secret,
    )
    notify_file: Path | None = flag(None, "file of more such URLs, one a line, mode 0600")
    notify_every_s: float = flag(
        600.0, "least seconds between two messages about the same", least=0.0, most=86_400.0
    )
    tls_cert: Path | None = flag(
        None, "certificate to show, PEM, with its chain if it has one; the server then speaks https only"
    )
    tls_key: Path | None = flag(None, "its key, PEM, mode 0600")
    loadbalancer_cert: Path | None = flag(
        None,
        "certificates that https loadbalancers may show, PEM, and no others",
        shown="what this machine's authorities vouch for",
    )
    trust_network: bool = flag(
        False,
        "speak plain HTTP beyond this machine, too: all who can listen there have the keys, and with "
        "them the fleet and its master tokens",
    )

    @property
    def notify_urls(self) -> tuple[str, ...]:
        """Where people are told what is wrong, by both flags; secret. Raises ConfigError for a bad file."""
        of_file = private_files.load_lines(self.notify_file, "--notify-file") if self.notify_file else ()
        return (*self.notify, *of_file)

    def login(self) -> RegistryLogin | None:
        """Return the login in the file of --registry-login, None without one; raise ConfigError."""
        if self.registry_login is None:
            return None
        where = f"--registry-login {self.registry_login}"
        lines = private_files.load_lines(self.registry_login, "--registry-login")
        words = lines[0].split() if len(lines) == 1 else []
        if len(words) not in (2, 3):
            raise ConfigError(f"{where}: wanted one line, USER PASSWORD [REGISTRY]")
        try:
            return RegistryLogin(*words)
        except ValueError as e:
            raise ConfigError(f"{where}: {e}") from None

    @property
    def said_policy(self) -> str:
        """All that the flags say of the policy, as one text that is the same for the same flags."""
        return f"{self.policy} {sorted(self.policy_param)} {self.goal}"

    def make_policy(self) -> Policy:
        """Return the policy that the flags say, with its parameters; raise ConfigError if they are wrong."""
        params = parse_params("--policy-param", self.policy_param)
        if self.goal is None:
            return make_policy(POLICIES, self.policy, params, self.speedup)
        if "goal" in params:
            raise ConfigError("--goal and --policy-param goal=…: wanted one of them")
        return make_policy(POLICIES, "objective", params | {"goal": self.goal}, self.speedup)

    @property
    def ready_url(self) -> str | None:
        """The URL at which an instance tells the autoscaler that it is ready; None if it cannot reach it."""
        if self.public_url is not None:
            return f"{self.public_url.rstrip('/')}/ready"
        return f"{scheme(self.tls_cert)}://127.0.0.1:{self.port}/ready" if self.local else None

    def offer_query(self, profile: Profile) -> str:
        """Return the search for machines that can run the profile and are wanted by the flags."""
        return f"{profile.offer_query(self.speedup)} {self.preferences.query()}".strip()

    def in_the_clear(self) -> list[InTheClear]:
        """Return what the command `serve` sends over a network unencrypted with this configuration."""
        keys = "the control key, and with it the fleet and its master tokens"
        return [
            *clear_bind(self.host, f"the operator's keys and {keys}", encrypted=self.tls_cert is not None),
            *(way for url in self.loadbalancer for way in clear_call("--loadbalancer", url, keys)),
            *clear_call("--public-url", self.public_url or "", "which instance is ready when"),
        ]

    @property
    def reach_places(self) -> list[tuple[str, int]]:
        """The (host, port) pairs that are connected to in order to see whether our own network works.

        Raises ConfigError where one is wrong.
        """
        if not self.reach:
            cloud = urlsplit(self.cloud_url if self.local else PRODUCTION_URL)
            return [(cloud.hostname or "", cloud.port or (443 if cloud.scheme == "https" else 80))]
        found = []
        for place in self.reach:
            host, _, port = place.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ConfigError(f"--reach {place!r}: wanted HOST:PORT")
            found.append((host.strip("[]"), int(port)))
        return found

    def checked(self) -> "AutoscalerConfig":
        """Return this configuration, or raise ConfigError naming the flag, the value and the range."""
        check_flags(self)
        if self.speedup != 1.0 and not self.local:
            raise ConfigError("--speedup is for --local only: real machines take their time")
        # Narrower than what the cloud allows, so that a label is one word in every message and command.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", self.label):
            raise ConfigError(f"--label {self.label!r}: wanted 1 to 64 of A-Z a-z 0-9 _ . -, first no . or -")
        _ = self.reach_places, self.preferences  # raise where one is wrong
        for url in self.loadbalancer:
            server_url("--loadbalancer", url)
        if self.public_url is not None:
            server_url("--public-url", self.public_url)
        return self


def local_cloud_key(environ: Mapping[str, str], home: Path) -> str:
    """Return the localcloud's API key, never the operator's of Vast.ai; raise ConfigError without one."""
    if key := environ.get("LOCALCLOUD_API_KEY", "").strip():
        return key
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    path = state / "autoscaler-py" / "localcloud" / "api.key"
    if not path.exists():
        raise ConfigError(
            f"no key of the local cloud in {path}: `python -m localcloud` makes it when it starts; "
            "for one with another --root set LOCALCLOUD_API_KEY"
        )
    return private_files.load_one_key(path)


def vast_settings(
    config: AutoscalerConfig, state_dir: Path, environ: Mapping[str, str], home: Path
) -> VastSettings:
    """Return how the vastai command is run with this configuration; raise ConfigError without a key.

    environ, home: where the key is looked for.
    """
    find_key = local_cloud_key if config.local else find_api_key
    return VastSettings(
        url=config.cloud_url if config.local else None,
        api_key=find_key(environ, home),
        local=config.local,
        state_dir=state_dir,
        speedup=config.speedup,
    )
