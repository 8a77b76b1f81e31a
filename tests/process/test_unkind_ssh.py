"""Each way in which a host is unkind about ssh, alone; what our log check says; keys by the real CLI."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet.outside.ssh_log import LoginRanNothing, LogView, SshLog
from localcloud.realism import HARSH
from localcloud.ssh_logins import SshLogin
from process.errors import InstanceError
from process.ssh_keys import load_or_make_ssh_key
from tests.process.test_harsh_market import run_vastai
from tests.process.test_localcloud import ONSTART, LocalCloud
from tests.waiting import wait_for

KEPT_FROM_TMUX = f"touch ~/.no_auto_tmux\n{ONSTART}"
SPEEDUP = 300.0


class Ssh:
    """One instance of a cloud with one unkindness, and our own ssh to it."""

    def __init__(self, path: Path, unkindness: str, onstart: str) -> None:
        self.path = path
        self.cloud = LocalCloud(path, "--realism", "harsh", "--only", unkindness)
        self.key = load_or_make_ssh_key(path / "key")
        self.public = f"{self.key.get_name()} {self.key.get_base64()} test"
        self.cloud.vast.register_ssh_key(self.public)
        self.onstart = onstart

    def rent(self, fits: Callable[[SshLogin], bool] = lambda _: True) -> int:
        """Rent a machine whose ssh is as wanted; return the instance's id."""
        offers = self.cloud.vast.search_offers("num_gpus=1 gpu_ram>=20", storage_gb=40.0)
        offer = next(o for o in offers if fits(SshLogin.of(o.machine_id, HARSH, SPEEDUP)))
        return self.cloud.vast.create(offer.id, "i", 40.0, "fleet/a", "-p 8000:8000", self.onstart)

    def look(self, instance_id: int) -> LogView:
        """Our log check."""
        reader = SshLog(self.key, lambda _, shown: shown)
        return reader.read("fleet/a", "127.0.0.1", self.cloud.ssh_port(instance_id), False, 10.0)

    def lets_us_in(self, instance_id: int) -> bool:
        """Whether it does now; what else happens is raised."""
        try:
            return self.look(instance_id).ready
        except LoginRanNothing:
            return False


@contextmanager
def ssh(path: Path, unkindness: str, onstart: str = ONSTART) -> Iterator[Ssh]:
    made = Ssh(path, unkindness, onstart)
    try:
        yield made
    finally:
        made.cloud.process.kill()
        made.cloud.process.wait()


def test_a_greeting_is_read_past(tmp_path: Path) -> None:
    with ssh(tmp_path, "ssh_greeting") as one:
        number = one.rent()
        wait_for("ready", lambda: one.lets_us_in(number))


def test_tmux_runs_nothing_unless_it_is_off(tmp_path: Path) -> None:
    with ssh(tmp_path, "ssh_tmux") as one:
        number = one.rent()
        with pytest.raises(LoginRanNothing, match="no sessions"):
            one.look(number)
    (tmp_path / "off").mkdir()
    with ssh(tmp_path / "off", "ssh_tmux", KEPT_FROM_TMUX) as one:
        number = one.rent()
        wait_for("ready", lambda: one.lets_us_in(number))


def test_a_key_comes_late(tmp_path: Path) -> None:
    with ssh(tmp_path, "ssh_key_lag_s") as one:
        number = one.rent()
        wait_for("ready", lambda: one.lets_us_in(number))
    assert SshLogin.of(1, HARSH, SPEEDUP).key_lag_s == 0.4


def test_where_the_accounts_keys_are_lost_an_attached_one_is_taken(tmp_path: Path) -> None:
    with ssh(tmp_path, "ssh_keys_lost") as one:
        number = one.rent(lambda login: not login.account_keys)
        one.cloud.in_state(number, "running")
        with pytest.raises(LoginRanNothing, match="not accepted"):
            one.look(number)
        one.cloud.vast.attach_ssh_key(number, one.public)
        wait_for("ready", lambda: one.lets_us_in(number))


def test_where_ssh_is_refused_nobody_listens_ever(tmp_path: Path) -> None:
    with ssh(tmp_path, "ssh_refused") as one:
        number = one.rent(lambda login: login.refused)
        one.cloud.in_state(number, "running")
        with pytest.raises(InstanceError, match="refused"):
            one.look(number)


def test_the_key_that_the_start_script_authorizes_is_accepted(tmp_path: Path) -> None:
    key = load_or_make_ssh_key(tmp_path / "key")
    line = f"{key.get_name()} {key.get_base64()}"
    script = f"mkdir -p ~/.ssh; echo {line} > ~/.ssh/authorized_keys\n{ONSTART}"
    with ssh(tmp_path, "ssh_keys_lost", script) as one:
        number = one.rent(lambda login: not login.account_keys)
        wait_for("ready", lambda: one.lets_us_in(number))


def test_ssh_keys_by_the_real_command_line(tmp_path: Path) -> None:
    def public(name: str) -> str:
        made = load_or_make_ssh_key(tmp_path / name)
        return f"{made.get_name()} {made.get_base64()} {name}"

    with ssh(tmp_path, "ssh_greeting") as one:
        number = one.rent()

        def cli(*words: str) -> str:
            return run_vastai(one.cloud.url, tmp_path, *words)

        assert "'success': True" in cli("create", "ssh-key", public("second"))
        assert public("second") in cli("show", "ssh-keys", "--raw")
        assert "'success': True" in cli("update", "ssh-key", "2", public("third"))
        shown = cli("show", "ssh-keys", "--raw")
        assert (public("third") in shown, public("second") in shown) == (True, False)
        assert "'success': True" in cli("attach", "ssh", str(number), public("third"))
        third = SshLog(load_or_make_ssh_key(tmp_path / "third"), lambda _, shown: shown)
        port = one.cloud.ssh_port(number)
        wait_for("ready", lambda: third.read("a", "127.0.0.1", port, False, 10.0).ready)
        assert "'success': True" in cli("detach", "ssh", str(number), "2")
        with pytest.raises(LoginRanNothing):
            third.read("a", "127.0.0.1", port, False, 10.0)
        assert "'success': True" in cli("delete", "ssh-key", "2")
        assert public("third") not in cli("show", "ssh-keys", "--raw")
        for words in (("delete", "ssh-key", "2"), ("detach", "ssh", str(number), "2")):
            assert "error 404" in cli(*words), words
