"""Answers of Vast.ai as the vastai command prints them, and a `Cli` that gives them without a process."""

import json
from collections.abc import Sequence
from typing import Any

from vast.cli import Cli, CliRun, Endpoint, in_words, judge
from vast.client import Vast
from vast.rows import Row

KEY = "k-0123456789abcdef0123456789"


class ScriptedCli(Cli):
    """Goes through the runs it is given, the last for ever, and keeps what it was asked."""

    def __init__(self) -> None:
        """Prepare nothing: no command is run."""
        self.argvs: list[list[str]] = []
        self.secrets: list[tuple[str, ...]] = []
        self._runs: list[CliRun] = []

    def plays(self, *runs: tuple[str, str, int]) -> Vast:
        """Return a Vast on this; each run is (stdout, stderr, exit status)."""
        self._runs = [CliRun(status, stdout, stderr) for stdout, stderr, status in runs]
        return Vast(self)

    def run(
        self,
        endpoint: Endpoint,
        words: Sequence[str],
        flags: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        script: str | None = None,
        secrets: Sequence[str] = (),
    ) -> str:
        """Judge the next run as the real one is judged."""
        self.argvs.append([*words, *flags])
        self.secrets.append(tuple(secrets))
        run = self._runs.pop(0) if len(self._runs) > 1 else self._runs[0]
        judge(in_words(words), endpoint, run)
        return run.stdout


def said(text: str) -> tuple[str, str, int]:
    return text + "\n", "", 0


def answered(value: object) -> tuple[str, str, int]:
    """As the CLI prints JSON under --raw."""
    return said(json.dumps(value, indent=1, sort_keys=True))


def refused(status: int, msg: str | None) -> tuple[str, str, int]:
    """As the CLI reports an HTTP error under --raw: on stderr, exit status 0."""
    return "", json.dumps({"error": True, "status_code": status, "msg": msg}) + "\n", 0


def refused_plainly(status: int, msg: str | None) -> tuple[str, str, int]:
    return "", f"Failed with error {status}: {msg}\n", 0


CRASH = 'Traceback (most recent call last):\n  File "x", line 1, in <module>\n'


def listing(rows: Sequence[object], total: int | None = None, **changed: object) -> dict[str, object]:
    """The service's envelope around one page."""
    return {
        "success": True,
        "instances_found": len(rows),
        "total_instances": len(rows) if total is None else total,
        "label_counts": {},
        "next_token": None,
        "instances": list(rows),
    } | changed


def instance(id: object = 1001, **changed: object) -> dict[str, object]:
    """A row as the service sends it (vast-contract 2.11)."""
    return {
        "id": id,
        "machine_id": 77,
        "label": "fleet/a",
        "actual_status": "running",
        "intended_status": "running",
        "cur_state": "running",
        "status_msg": "success, running\n",
        "public_ipaddr": " 63.135.50.11\n",
        "ports": {
            "22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "33522"}],
            "8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "33526"}, {"HostIp": "::", "HostPort": "33526"}],
        },
        "ssh_host": "ssh2.vast.ai",
        "ssh_port": 10882,
        "gpu_name": "RTX 3090",
        "num_gpus": 1,
        "dph_base": 0.2,
        "dph_total": 0.21,
        "storage_total_cost": 0.01,
        "instance": {"gpuCostPerHour": 0.2, "diskHour": 0.01, "totalHour": 0.21},
        "start_date": 1.7e9,
        "end_date": 1.8e9,
        "image_uuid": "vllm/vllm-openai",
        "onstart": "echo master-token",
        "extra_env": [["-p 8000:8000", "1"]],
    } | changed


ROW = Row(
    id=1001,
    machine_id=77,
    label="fleet/a",
    actual_status="running",
    intended_status="running",
    cur_state="running",
    status_msg="success, running",
    public_ip="63.135.50.11",
    ports={22: 33522, 8000: 33526},
    ssh_host="ssh2.vast.ai",
    ssh_port=10882,
    gpu_name="RTX 3090",
    num_gpus=1,
    dph_base=0.2,
    dph_total=0.21,
    storage_usd_h=0.01,
    price_now_usd_h=0.21,
    start_date=1.7e9,
    end_date=1.8e9,
    image="vllm/vllm-openai",
    onstart="echo master-token",
)


def offer(id: int = 11, **changed: object) -> dict[str, object]:
    """An offer as the service sends it (vast-contract 2.1)."""
    return {
        "id": id,
        "machine_id": 100 + id,
        "host_id": 5,
        "gpu_name": "RTX 3090",
        "num_gpus": 1,
        "gpu_ram": 24576,
        "dph_total": 0.21,
        "dph_base": 0.2,
        "storage_cost": 0.18,
        "inet_down": 800.5,
        "reliability": 0.99,
        "dlperf": None,
        "geolocation": "Norway, NO",
        "is_bid": False,
        "min_bid": 0.1,
        "duration": 1e6,
    } | changed


def create(vast: Vast, **changed: Any) -> int:
    order: dict[str, Any] = {
        "offer_id": 11,
        "image": "vllm/vllm-openai:v0.11.0",
        "disk_gb": 40.0,
        "label": "fleet/a",
        "env": "-p 3000:3000 -p 8000:8000",
        "onstart": "echo hello\n",
    }
    return vast.create(**(order | changed))


MANY = [instance(id) for id in range(1, 31)]
PUBLIC_KEY = "ssh-ed25519 AAAAC3Nza+/= autoscaler-py"
