"""The machine that a paced engine pretends to run on, which the local cloud describes in a file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.gpus import GpuNumbers
from process.errors import ConfigError


@dataclass(frozen=True)
class SimulatedMachine:
    """The GPUs and times of the machine that the engine pretends to run on.

    load_s: seconds from start to ready; start_s: the same when the file `loaded` exists.
    mem_gb, gb_s, fp32_tflops: of one GPU, as its offer says; 0 where it does not.
    fatal_line: the line that the engine logs instead of becoming ready. hub: fields of HubAccess.
    """

    gpu_name: str
    num_gpus: int
    load_s: float
    start_s: float
    fatal_line: str | None
    loaded: str | None
    mem_gb: float = 0.0
    gb_s: float = 0.0
    fp32_tflops: float = 0.0
    hub: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | None) -> "SimulatedMachine":
        """Return the machine that a file describes; for None one RTX 4090 that is ready at once.

        Raises ConfigError for a file that cannot be used.
        """
        if not path:
            return cls("RTX 4090", 1, 0.0, 0.0, None, None)
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise ConfigError(f"LOCALCLOUD_MACHINE={path} cannot be used: {type(e).__name__}: {e}") from e

    def write(self, path: Path) -> None:
        """Write the machine's description to a file."""
        path.write_text(json.dumps(asdict(self)))

    @property
    def told(self) -> GpuNumbers:
        """What the machine's offer says of one GPU."""
        return GpuNumbers(self.mem_gb, self.gb_s, self.fp32_tflops)

    @property
    def ready_s(self) -> float:
        """Seconds from the engine's start until it is ready: start_s if `loaded` exists, else load_s."""
        return self.start_s if self.loaded and Path(self.loaded).exists() else self.load_s
