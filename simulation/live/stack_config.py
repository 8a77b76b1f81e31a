"""The settings of a local stack: its engine, its size, and the programs it starts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from engine.profiles import get_profile
from process.errors import ConfigError


@dataclass(frozen=True)
class StackEngine:
    """What an engine of the local cloud needs from the rest of the stack.

    model, instances: what is served by how many, unless flags say otherwise. only_model: the engine serves no
    other. most_instances: how many fit on two cores. speedup: of the autoscaler's deadlines, where the model
    server takes its own time; None: the cloud's. patience: factor on how long the stack waits for instances.
    autoscaler_args: further flags of `serve`.
    """

    model: str
    instances: int
    most_instances: int
    only_model: bool = False
    speedup: float | None = None
    patience: float = 1.0
    autoscaler_args: tuple[str, ...] = ()


ENGINES: Mapping[str, StackEngine] = MappingProxyType(
    {
        # Placeholder text at the speed of the model on that GPU.
        "paced": StackEngine(model="vllm-13", instances=4, most_instances=1000),
        # Real vLLM: 2.5 GB and a processor each. The 300 s after which the policy stops what is not needed
        # are longer than a run, and it must not stop what has only just started.
        "vllm": StackEngine(
            model="tiny",
            instances=2,
            most_instances=2,
            only_model=True,
            speedup=1.0,
            patience=3.0,
            autoscaler_args=("--policy", "busy", "--policy-param", "remove_after_s=25"),
        ),
    }
)


@dataclass(frozen=True)
class StackConfig:
    """The settings of a local stack. Times in seconds, of the wall clock.

    speedup: boot and load times of the local cloud are the real ones divided by it. state_dir: for keys, logs
    and the cloud's disks; None makes a temporary one that is removed in the end. hot: instances that are hot
    before start() returns. realism, only: how unkind
    the cloud is, and if not in all, in which things. autoscaler_args: further flags of
    `autoscaler_server.py serve`.
    """

    engine: str = "paced"
    model: str = "vllm-13"
    instances: int = 4
    speedup: float = 60.0
    seed: int = 0
    realism: str = "none"
    only: tuple[str, ...] = ()
    label: str = "sim"
    max_instances: int = 6
    max_dollars_per_hour: float = 10.0
    poll_interval_s: float = 1.5  # one listing costs 0.5 s of processor, and there are two cores
    check_boot_every_s: float = 1.0
    state_dir: Path | None = None
    hot: int = 1
    autoscaler_args: tuple[str, ...] = ()

    def checked(self) -> "StackConfig":
        """Return the settings unchanged; raise a ConfigError with the value and the range."""
        get_profile(self.model)
        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine}: wanted {' or '.join(ENGINES)}")
        engine = ENGINES[self.engine]
        if engine.only_model and self.model != engine.model:
            raise ConfigError(f"--model {self.model}: the {self.engine} engine serves {engine.model} only")
        if not 1 <= self.instances <= self.limit:
            raise ConfigError(f"--instances {self.instances}: wanted 1 to {self.limit}")
        if not 1.0 <= self.speedup <= 10_000.0:
            raise ConfigError(f"--speedup {self.speedup:g}: wanted 1 to 10000")
        return self

    @property
    def limit(self) -> int:
        """The most instances that the stack has at a time."""
        return min(self.max_instances, ENGINES[self.engine].most_instances)


@dataclass(frozen=True)
class Programs:
    """The commands that start the stack's children, before their flags; tests give their own."""

    cloud: Sequence[str] = (sys.executable, "-m", "localcloud")
    autoscaler: Sequence[str] = (sys.executable, "autoscaler_server.py")
    loadbalancer: Sequence[str] = (sys.executable, "loadbalancer_server.py")
