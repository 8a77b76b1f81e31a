"""How unkind the local cloud is: one field for each thing in which the marketplace is harder than a test.

    NONE    every machine is as ordered, nobody else rents, nothing costs time or money but what is billed
    MILD    what everybody meets on the first day, at sizes that a demonstration survives
    HARSH   all of it, at the sizes that operators report (docs/reference/vast-contract.md 6)

A field is switched on alone by `only`, or by `--realism harsh --only FIELD`: so a test shows what one
unkindness does. Times are those of the real service: the local cloud divides them by its speedup.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from process.errors import ConfigError


@dataclass(frozen=True)
class Realism:
    """The unkindnesses of a local cloud; the default of each field is the kind value.

    rate_limits: calls faster than the service's thresholds get 429 (vast-contract 1.3), as by the fault
    rate-limits.
    big_market: some hundred machines instead of fifteen: 17 kinds of GPU, slices of 1, 2, 4 and 8, machines
    with another processor, an old driver, dear bandwidth, a short contract (localcloud/catalogue.py).
    renters: GPUs that other customers would like to have, as a share of all: they hold about half as many at
    1, and a slot that is given up may be taken before it is wanted back (vast-contract 6, row 5).
    price_moves: largest change of a machine's price for new rentals, as a share of it.
    offers_vanish: share of creates for whose offer another customer was faster (vast-contract 6, row 8).
    script_bytes: bytes of onstart and args together; a longer pair is taken and never starts: 16 KB are
    documented, 4,096 too, and 4,048 with this silence (vast-contract 9).
    ssh_greeting: ssh greets before a login and before a command's output. ssh_tmux: it runs commands in tmux,
    so none, until there is ~/.no_auto_tmux. ssh_key_lag_s: seconds until a key of the account, or an attached
    one, is accepted. ssh_keys_lost: share of hosts on which the account's keys never are, but attached ones.
    ssh_refused: share of hosts on which nobody ever listens for ssh (vast-contract 9).
    sizes: an image and a model take their size over the host's bandwidth to load (localcloud/images.py).
    foreign_cpus: no container can be made of an image for amd64 on a machine with arm64.
    bandwidth: each byte of images and models is billed at the host's price; without it hosts ask none.
    stopped_storage: how many times as much storage costs while a machine is stopped.
    contract_ends: a machine is stopped at the end of its contract, cannot be started, and goes 48 h later.
    price_increase: by which share more a host asks for some days before the end of a contract; without an
    answer the contract ends.
    spend_limit_usd_h: what a new account may spend an hour; a create above it is refused. 0: no limit.
    no_card: machines are deleted 48 h after the credit has gone.
    old_drivers: an image with a newer CUDA than the driver of a consumer's card does not find the GPU: vLLM
    dies with error 804 (vllm#5510).
    registry: only images of which localcloud/images.py has the repository are there; else every name is one.
    """

    rate_limits: bool = False
    big_market: bool = False
    renters: float = 0.0
    price_moves: float = 0.0
    offers_vanish: float = 0.0
    script_bytes: int = 16_384
    ssh_greeting: bool = False
    ssh_tmux: bool = False
    ssh_key_lag_s: float = 0.0
    ssh_keys_lost: float = 0.0
    ssh_refused: float = 0.0
    sizes: bool = False
    foreign_cpus: bool = False
    old_drivers: bool = False
    registry: bool = False
    bandwidth: bool = False
    stopped_storage: float = 1.0
    contract_ends: bool = False
    price_increase: float = 0.0
    spend_limit_usd_h: float = 0.0
    no_card: bool = False

    @property
    def crowded(self) -> bool:
        """Whether there are other customers, or what they do to prices."""
        return bool(self.renters or self.price_moves or self.offers_vanish)

    def only(self, names: Collection[str]) -> "Realism":
        """Return this realism with all fields kind but those named; raise ConfigError for an unknown name."""
        known = {f.name for f in fields(self)}
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown unkindness {name!r:.60}; known: {', '.join(sorted(known))}")
        return Realism(**{name: getattr(self, name) for name in names})


NONE = Realism()
MILD = Realism(
    rate_limits=True,
    renters=0.25,
    price_moves=0.05,
    offers_vanish=0.02,
    script_bytes=4_048,
    ssh_greeting=True,
    ssh_tmux=True,
    ssh_key_lag_s=20.0,
    sizes=True,
    foreign_cpus=True,
    old_drivers=True,
    bandwidth=True,
    stopped_storage=1.5,
    contract_ends=True,
)
HARSH = Realism(
    rate_limits=True,
    big_market=True,
    renters=1.0,
    price_moves=0.2,
    offers_vanish=0.1,
    script_bytes=4_048,
    ssh_greeting=True,
    ssh_tmux=True,
    ssh_key_lag_s=120.0,
    ssh_keys_lost=0.3,
    ssh_refused=0.15,
    sizes=True,
    foreign_cpus=True,
    old_drivers=True,
    registry=True,
    bandwidth=True,
    stopped_storage=3.0,
    contract_ends=True,
    price_increase=0.4,
    spend_limit_usd_h=10.0,
    no_card=True,
)

LEVELS: Mapping[str, Realism] = MappingProxyType({"none": NONE, "mild": MILD, "harsh": HARSH})
"""The values of the flag --realism."""
