"""The local cloud as a process: the real vastai rents, real ssh answers, and nothing is left when it ends."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paramiko
import pytest

from autoscaler_server import main as autoscaler_main
from engine.profiles import get_profile
from fleet.outside.ssh_log import HostKeyChanged, LoginRanNothing, SshLog
from fleet.outside.start_script import StartScript, render
from localcloud import __main__ as localcloud_main
from localcloud.processes import command_line
from process.errors import CloudError, InstanceError
from tests.commands import run_command
from tests.paths import ROOT
from tests.ports import free_port
from tests.vast_env import received
from tests.waiting import wait_for
from vast.billing import Billing
from vast.cli import Cli
from vast.client import Vast
from vast.rows import Row
from vast.settings import VastSettings

KEY = "k-of-a-test-0123456789"
LEAVES_OTHERS = """\
setsid sleep 1000 &
sleep 1000 &
echo done
"""
"""Ends at once, and what it started goes on: one process in its session, one in another."""

ONSTART = """\
echo "container $CONTAINER_ID, $GPU_COUNT GPU, port $VAST_TCP_PORT_8000, A is $A"
mkdir -p "$HOME/fleet"
echo "Application startup complete." > "$HOME/fleet/model.log"
sleep 1000 &
exec sleep 1000
"""


class LocalCloud:
    """A local cloud in a process of its own, and the real CLI in front of it."""

    def __init__(self, path: Path, *flags: str) -> None:
        self.root = path / "cloud"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = path / "log"
        command = [sys.executable, "-m", "localcloud", "--port", self.url.rpartition(":")[2]]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--root", str(self.root), "--speedup", "300", "--realism", "none", *flags],
                cwd=ROOT,
                env={**os.environ, "LOCALCLOUD_API_KEY": KEY},
                stdout=log,
                stderr=log,
            )
        wait_for("it answers", self.status)
        settings = VastSettings(state_dir=path, api_key=KEY, url=self.url, local=True, speedup=300.0)
        self.runs = Cli(settings)
        self.vast = Vast(self.runs)

    def status(self) -> Any:
        try:
            with urllib.request.urlopen(f"{self.url}/localcloud/status", timeout=5) as reply:  # noqa: S310
                return json.load(reply)
        except OSError:
            return None

    def post(self, path: str, body: Any) -> Any:
        return self.ask("POST", path, body)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """An answer without the half second that the CLI takes."""
        asked = urllib.request.Request(  # noqa: S310 our own port
            self.url + path, json.dumps(body).encode(), {"Authorization": f"Bearer {KEY}"}, method=method
        )
        with urllib.request.urlopen(asked, timeout=5) as reply:  # noqa: S310
            return json.load(reply)

    def rent_by_hand(self, start: str | StartScript, offer: int = 420_100) -> int:
        made = StartScript(start, "-p 3000:3000 -p 8000:8000") if isinstance(start, str) else start
        order = {"image": "i", "disk": 10.0, "onstart": made.onstart, "env": received(made.env)}
        return int(self.ask("PUT", f"/api/v0/asks/{offer}/", order)["new_contract"])

    def in_state(self, instance_id: int, state: str) -> Any:
        """Its row of the status once it is in that state."""

        def look() -> Any:
            rows = self.status()["instances"]
            return next((r for r in rows if r["id"] == instance_id and r["state"] == state), None)

        return wait_for(f"{instance_id} is {state}", look)

    def ssh_port(self, instance_id: int) -> int:
        """Where it listens for ssh, once it runs."""
        port: int = self.in_state(instance_id, "running")["ports"]["22/tcp"]
        return port

    def pids(self, instance_id: int, count: int) -> list[int]:
        """Its processes, once it has so many and runs."""

        def look() -> list[int] | None:
            found: list[int] = self.in_state(instance_id, "running")["pids"]
            return found if len(found) == count else None

        return wait_for(f"{instance_id} has {count} processes", look)

    def sleeping(self, instance_id: int, count: int) -> list[int]:
        """Its processes, once they are so many and all of them what a script of these tests leaves."""

        def look() -> bool:
            return all(command_line(pid)[:1] == [b"sleep"] for pid in self.pids(instance_id, count))

        wait_for(f"{instance_id} has {count} that sleep", look)
        return self.pids(instance_id, count)

    def serving(self, instance_id: int) -> list[int]:
        """Its processes, once they are supervisor, auth_server and model server, each of them once."""
        modules = {b"remote.supervise", b"remote.auth_server", b"vllm.entrypoints.cli.main"}

        def look() -> list[int] | None:
            found = self.pids(instance_id, len(modules))
            return found if modules <= {word for pid in found for word in command_line(pid)} else None

        return wait_for(f"{instance_id} serves", look)

    def rent(self, onstart: str = ONSTART) -> int:
        offers = self.vast.search_offers("num_gpus=1 gpu_ram>=20", storage_gb=40.0)
        return self.vast.create(
            offers[0].id, "vllm/vllm-openai:x", 40.0, "fleet/a", "-e A=7 -p 8000:8000 -p 3000:3000", onstart
        )

    def row(self, instance_id: int) -> Row:
        (row,) = [r for r in self.vast.list_instances() if r.id == instance_id]
        return row

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=20) == 0


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[LocalCloud]:
    cloud = LocalCloud(tmp_path)
    yield cloud
    cloud.process.kill()
    cloud.process.wait()


@pytest.fixture
def dear_cloud(tmp_path: Path) -> Iterator[LocalCloud]:
    """Its hosts bill each byte."""
    cloud = LocalCloud(tmp_path, "--realism", "harsh", "--only", "bandwidth")
    yield cloud
    cloud.process.kill()
    cloud.process.wait()


def alive(pids: list[int]) -> list[int]:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    return [pid for pid in pids if runs(pid)]


def state(pid: int) -> str:
    """S for sleeping, T for stopped, and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def greeting(port: int) -> bytes | None:
    """What is said first there: nothing within a moment, or None when nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.settimeout(0.3)
            return sock.recv(4)
    except ConnectionRefusedError:
        return None
    except (TimeoutError, ConnectionResetError):
        return b""


def logged_in(cloud: LocalCloud, instance_id: int) -> paramiko.SSHClient:
    """A session on the instance, with a key that was attached to it."""
    key = paramiko.Ed25519Key.from_private_key_file(str(make_key(cloud.root.parent / "key")))
    port = cloud.ssh_port(instance_id)
    cloud.post(f"/api/v0/instances/{instance_id}/ssh/", {"ssh_key": f"{key.get_name()} {key.get_base64()}"})

    def log_in() -> paramiko.SSHClient | None:
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())  # noqa: S507 it is our own
        try:
            client.connect(
                "127.0.0.1", port, "root", pkey=key, look_for_keys=False, allow_agent=False, timeout=5
            )
        except paramiko.AuthenticationException:  # the key is on its way
            client.close()
            return None
        return client

    return wait_for("it lets us in", log_in)


def reader(key: paramiko.PKey) -> SshLog:
    known: dict[str, str] = {}
    return SshLog(key, lambda label, shown: known.setdefault(label, shown))


def test_a_machine_is_rented_used_stopped_started_and_destroyed(cloud: LocalCloud) -> None:
    key = paramiko.Ed25519Key.from_private_key_file(str(make_key(cloud.root.parent / "key")))
    cloud.vast.register_ssh_key(f"{key.get_name()} {key.get_base64()} test")
    instance_id = cloud.rent()
    pids = cloud.pids(instance_id, 2)  # the script and what it started
    row = cloud.row(instance_id)
    assert (row.actual_status, row.label, set(row.ports)) == ("running", "fleet/a", {22, 3000, 8000})

    ssh = reader(key)
    assert ssh.read("a", "127.0.0.1", row.ports[22], False, 10.0).ready
    stranger = paramiko.Ed25519Key.from_private_key_file(str(make_key(cloud.root.parent / "other")))
    with pytest.raises(LoginRanNothing, match="not accepted"):
        reader(stranger).read("a", "127.0.0.1", row.ports[22], False, 10.0)
    port = row.ports[8000]
    assert f"container {instance_id}, 1 GPU, port {port}, A is 7" in cloud.vast.logs(instance_id)

    cloud.vast.stop(instance_id)
    cloud.in_state(instance_id, "stopped")
    wait_for("its processes are gone", lambda: not alive(pids))
    home = cloud.root / "instances" / str(instance_id) / "home"
    assert (home / "fleet" / "model.log").exists(), "a stopped instance keeps its disk"
    cloud.vast.start(instance_id)
    cloud.in_state(instance_id, "running")
    again = cloud.row(instance_id)
    assert ssh.read("a", "127.0.0.1", again.ports[22], False, 10.0).ready, "the host key is the same"

    cloud.post("/localcloud/faults", {"name": "ssh-hangs", "instance_id": instance_id})
    wait_for("ssh says nothing", lambda: greeting(again.ports[22]) == b"")
    with pytest.raises(InstanceError):
        ssh.read("a", "127.0.0.1", again.ports[22], False, 0.5)

    pids = cloud.pids(instance_id, 2)
    cloud.vast.destroy(instance_id)
    wait_for("its processes are gone", lambda: not alive(pids))
    wait_for("its disk is gone", lambda: not home.exists())
    assert cloud.vast.list_instances() == []
    cloud.end()


def test_a_killed_script_is_a_crash_and_a_finished_one_is_not(cloud: LocalCloud) -> None:
    quick, slow = cloud.rent_by_hand("echo done"), cloud.rent_by_hand(ONSTART, 420_101)
    cloud.in_state(quick, "running")
    pids = cloud.pids(slow, 2)
    os.kill(pids[0], signal.SIGKILL)
    cloud.in_state(slow, "crashed")
    wait_for("the rest of it is gone", lambda: not alive(pids))
    assert cloud.in_state(quick, "running")["pids"] == [], "a container goes on without its script"


def test_a_new_host_key_is_noticed_and_a_dropped_port_leads_nowhere(cloud: LocalCloud) -> None:
    key = paramiko.Ed25519Key.from_private_key_file(str(make_key(cloud.root.parent / "key")))
    cloud.post("/api/v0/ssh/", {"ssh_key": f"{key.get_name()} {key.get_base64()} test"})
    instance_id = cloud.rent_by_hand(ONSTART)
    port = cloud.ssh_port(instance_id)
    cloud.pids(instance_id, 2)
    ssh = reader(key)
    assert ssh.read("a", "127.0.0.1", port, False, 10.0).ready
    cloud.post("/localcloud/faults", {"name": "new-host-key", "count": 1})
    cloud.ask("PUT", f"/api/v0/instances/{instance_id}/", {"state": "stopped"})
    cloud.in_state(instance_id, "stopped")
    cloud.ask("PUT", f"/api/v0/instances/{instance_id}/", {"state": "running"})
    port = cloud.ssh_port(instance_id)
    with pytest.raises(HostKeyChanged):
        ssh.read("a", "127.0.0.1", port, False, 10.0)

    cloud.post("/localcloud/faults", {"name": "port-drops", "count": 1})
    port = cloud.ssh_port(cloud.rent_by_hand(ONSTART, 420_101))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_what_a_start_script_left_running_ends_with_its_instance(cloud: LocalCloud) -> None:
    stopped, killed, destroyed = (cloud.rent_by_hand(LEAVES_OTHERS, 420_100 + slot) for slot in range(3))
    for instance_id in (stopped, killed, destroyed):
        pids = cloud.sleeping(instance_id, 2)
        if instance_id == stopped:
            cloud.ask("PUT", f"/api/v0/instances/{instance_id}/", {"state": "stopped"})
            cloud.in_state(instance_id, "stopped")
        elif instance_id == killed:
            cloud.post(f"/localcloud/instances/{instance_id}/kill", {})
            cloud.in_state(instance_id, "crashed")
        else:
            cloud.ask("DELETE", f"/api/v0/instances/{instance_id}/")
        wait_for("they are gone", lambda pids=pids: not alive(pids))  # type: ignore[misc]


def test_commands_over_ssh_are_processes_of_the_instance(cloud: LocalCloud) -> None:
    """They end when it does, also in the background; one that takes long does not hold up the cloud's end."""
    client = logged_in(cloud, cloud.rent_by_hand("true"))
    instance_id = cloud.status()["instances"][0]["id"]
    _, out, _ = client.exec_command("setsid sleep 1000 >/dev/null 2>&1 & echo $HOME; exit 3", timeout=10)
    home = cloud.root / "instances" / str(instance_id) / "home"
    assert out.read().decode().strip() == str(home)
    assert out.channel.recv_exit_status() == 3
    pids = cloud.sleeping(instance_id, 1)
    cloud.ask("PUT", f"/api/v0/instances/{instance_id}/", {"state": "stopped"})
    wait_for("it is gone", lambda: not alive(pids))
    client.close()

    cloud.ask("PUT", f"/api/v0/instances/{instance_id}/", {"state": "running"})
    cloud.in_state(instance_id, "running")
    client = logged_in(cloud, instance_id)
    client.exec_command("exec sleep 1000")
    pids = cloud.sleeping(instance_id, 1)
    cloud.end()
    assert not alive(pids)
    client.close()


def test_a_reboot_keeps_the_disk_and_a_recycle_does_not(cloud: LocalCloud) -> None:
    instance_id = cloud.rent_by_hand('echo x >> "$HOME/boots"\nexec sleep 1000\n')
    boots = cloud.root / "instances" / str(instance_id) / "home" / "boots"

    def ran() -> int:
        return len(boots.read_text()) // 2 if boots.exists() else 0

    wait_for("it has booted", lambda: ran() == 1)
    for ask, times in (("reboot", 2), ("recycle", 1)):
        seen = cloud.sleeping(instance_id, 1)
        cloud.ask("PUT", f"/api/v0/instances/{ask}/{instance_id}/", {})
        wait_for("its processes have ended", lambda seen=seen: not alive(seen))  # type: ignore[misc]
        wait_for(f"it has booted {times} times on this disk", lambda times=times: ran() == times)  # type: ignore[misc]


def test_a_lost_host_stands_still_and_a_found_one_goes_on(cloud: LocalCloud) -> None:
    instance_id = cloud.rent_by_hand(LEAVES_OTHERS)
    pids = cloud.sleeping(instance_id, 2)
    port = cloud.ssh_port(instance_id)
    wait_for("ssh answers", lambda: greeting(port))
    cloud.post("/localcloud/faults", {"name": "offline", "instance_id": instance_id})
    cloud.in_state(instance_id, "offline")
    wait_for("all of them stand still", lambda: {state(pid) for pid in pids} == {"T"})
    wait_for("ssh says nothing", lambda: greeting(port) == b"")
    cloud.ask("DELETE", "/localcloud/faults/offline")
    cloud.in_state(instance_id, "running")
    wait_for("all of them go on", lambda: {state(pid) for pid in pids} == {"S"})
    wait_for("ssh answers again", lambda: greeting(port))

    cloud.post("/localcloud/faults", {"name": "ssh-refuses"})
    wait_for("nobody listens", lambda: greeting(port) is None)
    cloud.ask("DELETE", "/localcloud/faults/ssh-refuses")
    wait_for("ssh answers once more", lambda: greeting(port))


def test_a_killed_model_server_is_started_again_by_its_instance(cloud: LocalCloud) -> None:
    instance_id = cloud.rent_by_hand(render(get_profile("vllm-13"), "m"))
    log = cloud.root / "instances" / str(instance_id) / "home" / "fleet" / "model.log"
    wait_for("its model server is up", functools.partial(is_ready, log))
    before = cloud.pids(instance_id, 3)
    cloud.post(f"/localcloud/instances/{instance_id}/kill", {"part": "model"})
    wait_for("one of them is gone", lambda: len(alive(before)) == 2)
    after = cloud.pids(instance_id, 3)
    assert len(set(before) & set(after)) == 2


def test_an_instance_boots_from_what_the_real_cli_delivers_under_the_strictest_limits(tmp_path: Path) -> None:
    """Whatever the vastai command does to script and variables on the way is done here, too."""
    cloud = LocalCloud(tmp_path, "--realism", "harsh", "--only", "script_bytes")
    try:
        start = render(
            replace(get_profile("vllm-13"), env={"WORDS": "two words"}), "m", None, "ssh-ed25519 AAAA x"
        )
        offer = cloud.vast.search_offers("num_gpus=1 gpu_ram>=20", storage_gb=40.0)[0]
        instance_id = cloud.vast.create(offer.id, "i", 40.0, "fleet/a", start.env, start.onstart)
        cloud.serving(instance_id)
        home = cloud.root / "instances" / str(instance_id) / "home"
        assert (home / ".ssh" / "authorized_keys").read_text() == "\nssh-ed25519 AAAA\n"
        (pid,) = [p for p in cloud.serving(instance_id) if b"remote.supervise" in command_line(p)]
        assert b"WORDS=two words\0" in Path(f"/proc/{pid}/environ").read_bytes()
    finally:
        cloud.end()


def test_calls_that_hang_do_not_stop_the_others(cloud: LocalCloud) -> None:
    """Each keeps a thread, but only as long as its caller is there."""
    cloud.post("/localcloud/faults", {"name": "list-hangs"})
    head = f"GET /api/v1/instances/ HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    port = int(cloud.url.rpartition(":")[2])
    for _ in range(3 * localcloud_main.THREADS):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(head.encode())
    wait_for("it answers", cloud.status)


def test_a_body_that_is_too_large_is_refused_by_its_head(cloud: LocalCloud) -> None:
    """It would be kept before the key is looked at, and up to a gigabyte was."""
    head = f"PUT /api/v0/asks/1/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**25}\r\n\r\n"
    port = int(cloud.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(head.encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("script", ["deployed", "leaves others"])
def test_nothing_outlives_a_killed_cloud(cloud: LocalCloud, tmp_path: Path, script: str) -> None:
    if script == "deployed":
        pids = cloud.pids(cloud.rent_by_hand(render(get_profile("vllm-13"), "m")), 3)
    else:
        pids = cloud.sleeping(cloud.rent_by_hand(LEAVES_OTHERS), 2)
    cloud.process.kill()
    cloud.process.wait()
    again = LocalCloud(tmp_path)
    try:
        assert not alive(pids), "the next cloud in the same directory begins when they are gone"
        assert again.status()["instances"] == []
    finally:
        again.end()


def test_a_directory_belongs_to_one_cloud(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localcloud_main, "LOCK_WAIT_S", 0.1)
    instance_id = cloud.rent_by_hand(ONSTART)
    cloud.pids(instance_id, 2)
    flags = ("--root", str(cloud.root), "--port", str(free_port()))
    ended = run_command("localcloud", localcloud_main.main, *flags)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "another local cloud" in ended.err
    assert (cloud.root / "instances" / str(instance_id) / "home").exists()
    assert len(cloud.pids(instance_id, 2)) == 2


def test_a_port_in_use_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = subprocess.run(
            [sys.executable, "-m", "localcloud", "--root", str(tmp_path / "c"), "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)


def make_key(path: Path) -> Path:
    from process.ssh_keys import load_or_make_ssh_key

    load_or_make_ssh_key(path)
    return path


def is_ready(log: Path) -> bool:
    return log.exists() and "Application startup complete." in log.read_text()


def cpu_s(pids: list[int]) -> float:
    """Processor seconds that these have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def rss_mb(pids: list[int]) -> float:
    return sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids) * 4096 / 1e6


@pytest.mark.alone
def test_six_idle_instances_cost_little(cloud: LocalCloud) -> None:
    """Under 15 % of one core and 600 MB together (with the start script that is deployed)."""
    script = render(get_profile("vllm-13"), "m")
    ids = [cloud.rent_by_hand(script, 420_200 + slot) for slot in range(6)]
    for instance_id in ids:
        log = cloud.root / "instances" / str(instance_id) / "home" / "fleet" / "model.log"
        wait_for("ready", functools.partial(is_ready, log))
    pids = [pid for instance_id in ids for pid in cloud.serving(instance_id)]
    everything = [*pids, cloud.process.pid]
    before, begun = cpu_s(everything), time.monotonic()
    time.sleep(3.0)  # what is measured is that nothing happens
    share = (cpu_s(everything) - before) / (time.monotonic() - begun)
    assert share < 0.15
    assert rss_mb(pids) < 600
    print(f"6 idle instances: {rss_mb(pids):.0f} MB, cloud {rss_mb([cloud.process.pid]):.0f} MB, {share:.1%}")


SHARES_MEMORY = """\
exec python3 -c '
import multiprocessing, os, time
from multiprocessing.shared_memory import SharedMemory
block, lock = SharedMemory(create=True, size=1000), multiprocessing.get_context("spawn").Lock()
print(block.name, lock._semlock.name, flush=True)
time.sleep(1000)'
"""


@pytest.mark.parametrize("how", ["destroy", "kill", "stop"])
def test_the_shared_memory_of_an_instance_ends_with_it(cloud: LocalCloud, how: str) -> None:
    """A container's vanishes with the container; here SIGKILL leaves it, and nobody else would remove it."""
    number = cloud.rent_by_hand(SHARES_MEMORY)

    def names() -> Any:
        console = cloud.root / "instances" / str(number) / "console.log"
        return console.exists() and console.read_text().split()

    block, lock = wait_for("it has shared memory", names)
    files = [Path("/dev/shm") / block, Path("/dev/shm") / f"sem.{lock.lstrip('/')}"]
    assert all(path.exists() for path in files), files
    if how == "destroy":
        cloud.ask("DELETE", f"/api/v0/instances/{number}/")
    elif how == "kill":
        cloud.ask("POST", f"/localcloud/instances/{number}/kill", {"part": "all"})
    else:
        cloud.ask("PUT", f"/api/v0/instances/{number}/", {"state": "stopped"})
    wait_for("all is gone", lambda: not any(path.exists() for path in files))


def test_the_real_command_reads_what_was_charged_and_answers_price_increases(dear_cloud: LocalCloud) -> None:
    """`show invoices-v1 --charges`, `show pending-price-increases` and `accept price-increase` of 1.9.1."""
    cloud = dear_cloud
    rented = cloud.rent()
    cloud.in_state(rented, "running")
    billing = Billing(cloud.runs)
    now = time.time()
    (charged,) = billing.charges(now - 600.0, now + 60.0)
    assert (charged.instance, charged.label) == (rented, "fleet/a")
    assert charged.traffic > 0.0, "its image has come"
    # The service rounds each of them.
    assert charged.total == pytest.approx(charged.gpu + charged.storage + charged.traffic, abs=1e-8)
    (machine,) = cloud.status()["instances"]
    assert charged.traffic <= machine["usd"]["traffic"] + 1e-6
    assert billing.charges(now + 86_400.0, now + 2 * 86_400.0) == []
    assert billing.price_increases() == []
    cloud.post("/localcloud/faults", {"name": "price-increase", "share": 0.25})
    (asked,) = billing.price_increases()
    assert asked.instance == rented
    gpu_usd_h = asked.new_usd_h - asked.old_usd_h
    assert gpu_usd_h == pytest.approx(0.25 * (asked.old_usd_h - 0.15 * 40 / 720), rel=0.01)
    billing.answer_price_increase(rented, accept=True)
    assert billing.price_increases() == []
    with pytest.raises(CloudError):
        billing.answer_price_increase(rented, accept=False)


def test_a_plan_says_what_would_be_rented_and_rents_nothing(
    dear_cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = dear_cloud
    monkeypatch.setenv("LOCALCLOUD_API_KEY", KEY)
    flags = ["--local", "--cloud-url", cloud.url, "--state-dir", str(tmp_path / "state"), "--speedup", "300"]
    done = run_command("autoscaler_server.py", autoscaler_main, "plan", "--count", "2", "--json", *flags)
    said = json.loads(done.out)
    assert [one["host"] for one in said["taken"]] == [7001, 7002]  # at most a third of the fleet on one
    assert said["fits"] is None
    assert [one for one in said["taken"] if one not in said["offers"]] == []
    assert said["taken"][0]["usd_to_set_up"] > said["taken"][0]["download_usd"] > 0.0
    assert "prepare --count 2: $" in said["says"][0]
    assert "take" in run_command("autoscaler_server.py", autoscaler_main, "plan", *flags).out
    assert cloud.vast.list_instances() == []


def test_a_plan_plays_a_trace_on_the_machines_that_an_operator_wants(
    cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALCLOUD_API_KEY", KEY)
    flags = ["--local", "--cloud-url", cloud.url, "--state-dir", str(tmp_path / "state"), "--speedup", "300"]
    flags += ["--json", "--region", "EU", "--max-usd-gpu-hour", "0.5", "--avoid-host", "7002"]
    trace = "synthetic:days=0.02,rate=0.5"
    done = run_command("autoscaler_server.py", autoscaler_main, "plan", *flags, "--trace", trace)
    said = json.loads(done.out)
    assert {one["place"] for one in said["offers"]} == {"Sweden, SE"}
    assert all(one["usd_gpu_h"] <= 0.5 for one in said["offers"])
    assert said["played"]["requests"] > 100
    assert 0.0 < said["played"]["usd_day"] < 24.0
    assert any("0.5 $/h a GPU" in one for one in said["says"])
    assert cloud.vast.list_instances() == []


def test_a_plan_shows_which_gpus_of_the_market_serve_a_model_in_time(
    dear_cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALCLOUD_API_KEY", KEY)
    flags = ["--local", "--cloud-url", dear_cloud.url, "--state-dir", str(tmp_path / "state")]
    flags += ["--speedup", "300", "--model", "qwen3-14b", "--fits"]
    said = json.loads(run_command("autoscaler_server.py", autoscaler_main, "plan", "--json", *flags).out)
    there = {(fit["gpu_name"], fit["num_gpus"]) for fit in said["fits"]}
    assert {gpu for gpu, _ in there} == {"RTX A6000", "L40S", "A100 SXM4", "H100 SXM"}
    prices = [fit["usd_per_million_tokens"] for fit in said["fits"]]
    assert prices == sorted(prices)
    shown = run_command("autoscaler_server.py", autoscaler_main, "plan", *flags).out
    assert "1 x H100 SXM" in shown
    assert "Would hold it, but none was found:" in shown


def test_a_plan_of_a_day_that_nobody_knows_is_refused(
    cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALCLOUD_API_KEY", KEY)
    flags = ["--local", "--cloud-url", cloud.url, "--state-dir", str(tmp_path / "state"), "--speedup", "300"]
    done = run_command("autoscaler_server.py", autoscaler_main, "plan", *flags, "--yesterday")
    assert done.status == 2
    assert "0 requests are known of the last day" in done.err
