"""How long things take: drawn by chance around what is usual, or from sizes over the host's bandwidth."""

import random
from dataclasses import dataclass

from localcloud.images import image_gb, model_gb
from localcloud.machines import Machine
from localcloud.orders import Order

IMAGE_MBIT_S, MODEL_MBIT_S = 2_000.0, 5_000.0
"""Most Mbit/s at which one image is pulled and unpacked, and one model comes from its hub, however fast the
host's link is. Assumptions: no measurement is published (docs/reference/timing.md 4)."""

MBIT_A_GB = 8_000.0


@dataclass(frozen=True)
class Times:
    """How long things take at the real service, in seconds; each is drawn within ±spread of it.

    provision, create: order to container; pull: image to a machine that has it not; restart: container up
    again with the image there; load, start: the model server from its start to ready, the first time and
    with the model on the disk; stop: SIGTERM to SIGKILL, docker's default; reboot: container down and up.
    """

    provision_s: float = 3.0
    create_s: float = 2.0
    pull_s: float = 180.0
    restart_s: float = 15.0
    load_s: float = 420.0
    start_s: float = 75.0
    stop_s: float = 10.0
    reboot_s: float = 10.0
    spread: float = 0.2


class Downloads:
    """The downloads under way on all machines. A slice has the whole link while its neighbours are idle."""

    def __init__(self, speedup: float) -> None:
        """Begin without any. speedup: divides the times."""
        self._speedup = speedup
        self._until: dict[int, list[float]] = {}  # machine_id: when each that began is over, epoch seconds

    def begin(self, machine: Machine, gb: float, most_mbit_s: float, at: float) -> float:
        """Note a download that begins now; return the seconds of the clock that it takes.

        Those that are under way share the link with it; what it takes is not changed by later ones.
        """
        under_way = [until for until in self._until.get(machine.machine_id, ()) if until > at]
        mbit_s = min(machine.inet_down / (len(under_way) + 1), most_mbit_s)
        seconds = gb * MBIT_A_GB / mbit_s / self._speedup
        self._until[machine.machine_id] = [*under_way, at + seconds]
        return seconds


class Durations:
    """How long things take for one rental, in seconds of the clock."""

    def __init__(
        self, times: Times, speedup: float, chance: random.Random, downloads: Downloads | None
    ) -> None:
        """Draw durations from that generator. speedup divides them. downloads: None where size is nothing."""
        self.times = times
        self._speedup = speedup
        self._chance = chance
        self._downloads = downloads

    def draw(self, real_s: float) -> float:
        """Return a random duration, within ±spread of the real one."""
        spread = self.times.spread
        return real_s * self._chance.uniform(1.0 - spread, 1.0 + spread) / self._speedup

    def pull_s(self, order: Order, machine: Machine, at: float) -> float:
        """Return how long the image takes that a machine begins to pull."""
        if self._downloads is None:
            return self.draw(self.times.pull_s)
        return self._downloads.begin(machine, image_gb(order.image), IMAGE_MBIT_S, at)

    def load_s(self, order: Order, machine: Machine, start_s: float, at: float) -> float:
        """Return how long the model server takes that begins to load a model for the first time.

        start_s: what it takes once the model is there.
        """
        if self._downloads is None or not self.times.load_s:  # 0: a real engine takes its own time
            return self.draw(self.times.load_s)
        return start_s + self._downloads.begin(machine, model_gb(order), MODEL_MBIT_S, at)
