"""Health checks: what a log and a prompt say, and that one dead machine delays no other."""

import asyncio
import contextlib
import errno
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import paramiko
import pytest

from fleet.blame import cause_of
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.outside.health_checker import NO_CHAT_TEMPLATE, HealthChecker
from fleet.outside.ssh_log import (
    FATAL_LINES,
    MAX_OUTPUT,
    READY_LINE,
    HostKeyChanged,
    LoginRanNothing,
    LogView,
    SshLog,
    grep_command,
    parse,
)
from fleet.probe_prompts import MOST_CHARACTERS, as_completion
from fleet.states import State
from instance_client import PromptRefused
from process.errors import InstanceError
from web.messages.reports import LoadReport, TokenBatch

LOAD = LoadReport(
    boot_id="b",
    seq=0,
    missed=False,
    started=(),
    ended=(),
    running=2,
    waiting=1,
    kv_use=None,
    model_up=True,
    prompt_tokens_total=0,
    generation_tokens_total=0,
)


@dataclass
class Client:
    """An instance's HTTP side. hangs: auth urls that never answer; refuses: prompts that fail.

    no_chats: as a model without a chat template. loads: the model server does not answer yet. lost: the
    auth_server cannot be reached. prompted: what was sent. certificates: with which.
    """

    hangs: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    no_chats: bool = False
    loads: bool = False
    lost: bool = False
    certificates: list[str | None] = field(default_factory=list)
    prompted: list[Mapping[str, Any]] = field(default_factory=list)

    async def fetch_tokens(
        self, auth_url: str, master: str, count: int, timeout_s: float, certificate: str | None = None
    ) -> TokenBatch:
        if auth_url in self.hangs:
            await asyncio.sleep(3600)
        return TokenBatch(("token",) * count, "b", 600.0, LOAD)

    async def fetch_load(
        self, auth_url: str, master: str, after: int, timeout_s: float, certificate: str | None = None
    ) -> LoadReport:
        self.certificates.append(certificate)
        if self.lost:
            raise InstanceError(f"{auth_url}: no connection") from TimeoutError()
        return msgspec.structs.replace(LOAD, model_up=not self.loads)

    async def test_prompt(
        self,
        address: str,
        token: str,
        body: Mapping[str, Any],
        timeout_s: float,
        certificate: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        self.prompted.append(body)
        self.certificates.append(certificate)
        if self.no_chats and "messages" in body:
            raise PromptRefused(f"{address}: 400")
        if address in self.refuses:
            raise InstanceError(f"{address}: expected a token, got 500")
        return 1


class Log:
    """An ssh side that shows one view; `Hangs` sleeps until its timeout as a socket would."""

    def __init__(self, view: LogView | Exception, hanging: frozenset[str] = frozenset()) -> None:
        self.view = view
        self.hanging = hanging

    def read(self, label: str, host: str, port: int, hot: bool, timeout_s: float) -> LogView:
        if label in self.hanging:
            time.sleep(timeout_s)
            raise InstanceError("ssh: timed out")
        if isinstance(self.view, Exception):
            raise self.view
        return self.view


def test_a_model_without_a_chat_template_does_not_become_hot() -> None:
    """It would refuse every chat; a check that sends a completion now and then would let it pass."""
    for _ in range(20):
        found = check(order(), Log(READY), Client(no_chats=True))
        assert (found.verdict, found.why) == (Verdict.FATAL, NO_CHAT_TEMPLATE)
        assert cause_of(found.why).sign is not None, "the deployment's fault, not the machine's"
        assert found.met


@pytest.mark.parametrize("state", [State.RUNNING, State.HOT])
def test_a_model_of_vectors_is_sent_texts_to_be_embedded(state: State) -> None:
    client = Client()
    for _ in range(20):
        passed = check(order(state=state), Log(READY), client, chats=False, pooling=True)
        assert passed.verdict is Verdict.PASSED
    assert {frozenset(body) for body in client.prompted} == {frozenset({"model", "input"})}
    assert all(isinstance(body["input"], str) and len(body["input"]) > 10 for body in client.prompted)


@pytest.mark.parametrize(("state", "chats"), [(State.HOT, True), (State.RUNNING, False)])
def test_a_model_for_completions_only_and_a_hot_machine_are_asked_for_a_completion(
    state: State, chats: bool
) -> None:
    client = Client(no_chats=True)
    for _ in range(20):
        assert check(order(state=state), Log(READY), client, chats=chats).verdict is Verdict.PASSED
    asked = [n for n, body in enumerate(client.prompted) if "messages" in body]
    assert 0 < len(asked) < len(client.prompted)
    for n in asked:
        text = " ".join(said["content"] for said in client.prompted[n]["messages"])
        assert client.prompted[n + 1]["prompt"] == text
    broken = Client(refuses=frozenset({"http://m1"}))
    assert check(order(), Log(READY), broken).verdict is Verdict.FAILED
    assert len(broken.prompted) == 1


class Stalls(Client):
    """Gives tokens, and takes a test prompt of more than so many characters without answering it."""

    def __init__(self, characters: int = 0) -> None:
        super().__init__()
        self._characters = characters

    async def test_prompt(
        self,
        address: str,
        token: str,
        body: Mapping[str, Any],
        timeout_s: float,
        certificate: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        if len(str(body)) > self._characters:
            await asyncio.sleep(3600)
        return await super().test_prompt(address, token, body, timeout_s, certificate, headers)


def accused(n: int = 1) -> HealthCheckOrder:
    return replace(order(n, State.HOT, read_log=False), long_prompt=True)


def look(order: HealthCheckOrder, client: Client, timeout_s: float = 5.0) -> HealthCheck:
    """Check with a clock that goes on, and long prompts of 2,000 characters."""
    log: Any = Log(READY)
    checker = HealthChecker(
        client,  # type: ignore[arg-type]
        log,
        lambda label: "master",
        "vllm-13",
        timeout_s,
        time.monotonic,
        long_prompt=2000,
    )
    return asyncio.run(checker.check(order))


def test_a_machine_that_clients_accuse_gets_a_test_prompt_as_long_as_theirs() -> None:
    client = Client()
    for _ in range(20):
        assert look(accused(), client).verdict is Verdict.PASSED
        assert look(order(read_log=False), client).verdict is Verdict.PASSED
    texts = [len(as_completion(b)["prompt"] if "messages" in b else b["prompt"]) for b in client.prompted]
    assert min(texts[::2]) > 1500
    assert max(texts[::2]) <= 2001
    assert max(texts[1::2]) <= MOST_CHARACTERS + 1


def test_how_long_a_test_prompt_took_is_told() -> None:
    pace = look(order(), Client()).pace
    assert pace is not None
    assert (pace.tokens, 0.0 <= pace.took_s < 5.0) == (1, True)


def test_who_answers_short_prompts_only_is_found_to_stall() -> None:
    liar = Stalls(characters=1200)
    assert look(order(state=State.HOT, read_log=False), liar, 0.3).verdict is Verdict.PASSED
    found = look(accused(), liar, 0.3)
    assert (found.verdict, found.stalled, found.pace) == (Verdict.FAILED, True, None)


def test_no_answer_before_the_test_prompt_is_no_stall() -> None:
    found = look(accused(), Client(hangs=frozenset({"http://a1"})), 0.3)
    assert (found.verdict, found.stalled) == (Verdict.FAILED, False)


def order(n: int = 1, state: State = State.RUNNING, read_log: bool = True) -> HealthCheckOrder:
    return HealthCheckOrder(f"f/{n}", n, state, ("127.0.0.1", 22), f"http://a{n}", f"http://m{n}", read_log)


def check(order: HealthCheckOrder, log: Any, client: Any, timeout_s: float = 5.0, **kind: Any) -> HealthCheck:
    checker = HealthChecker(client, log, lambda label: "master", "vllm-13", timeout_s, lambda: 100.0, **kind)
    return asyncio.run(checker.check(order))


READY = LogView(ready=True)


@pytest.mark.parametrize(
    ("view", "client", "state", "verdict"),
    [
        (READY, Client(), State.RUNNING, Verdict.PASSED),
        (LogView(ready=False), Client(), State.RUNNING, Verdict.LOADING),
        (LogView(ready=True, fatal="CUDA out of memory"), Client(), State.RUNNING, Verdict.FATAL),
        (LogView(ready=False, fatal="fleet: giving up"), Client(), State.HOT, Verdict.FATAL),
        (HostKeyChanged("changed"), Client(), State.RUNNING, Verdict.FATAL),
        (InstanceError("refused"), Client(), State.RUNNING, Verdict.FAILED),
        (LoginRanNothing("no sessions"), Client(), State.RUNNING, Verdict.FAILED),
        # A hot instance whose ssh fails is judged by the prompt: ssh alone says nothing about service.
        (InstanceError("refused"), Client(), State.HOT, Verdict.PASSED),
        (READY, Client(refuses=frozenset({"http://m1"})), State.RUNNING, Verdict.FAILED),
        (READY, Client(refuses=frozenset({"http://m1"})), State.HOT, Verdict.FAILED),
        (LogView(ready=False), Client(), State.HOT, Verdict.LOADING),
    ],
)
def test_hot_needs_a_ready_line_no_fatal_line_and_a_token(
    view: LogView | Exception, client: Client, state: State, verdict: Verdict
) -> None:
    assert check(order(state=state), Log(view), client).verdict is verdict


def test_a_running_instance_without_ports_is_not_healthy() -> None:
    bare = HealthCheckOrder("f/1", 1, State.RUNNING, None, None, None, True)
    assert check(bare, Log(READY), Client()).verdict is Verdict.FAILED


def test_a_draining_instance_is_only_asked_what_it_still_has() -> None:
    found = check(order(state=State.DRAINING), Log(InstanceError("unused")), Client())
    assert (found.verdict, found.in_flight) == (Verdict.PASSED, 3)


def test_fifty_checks_of_which_ten_hang_are_done_within_one_timeout() -> None:
    """Five hang in ssh, five in HTTP; compared with one hanging check in the same run."""
    timeout_s = 1.5
    hanging = frozenset(f"f/{n}" for n in range(5))
    client = Client(hangs=frozenset(f"http://a{n}" for n in range(5, 10)))
    checker = HealthChecker(client, Log(READY, hanging), lambda label: "m", "vllm-13", timeout_s, lambda: 1.0)  # type: ignore[arg-type]

    async def run(orders: list[HealthCheckOrder]) -> tuple[list[HealthCheck], float]:
        begun = time.monotonic()
        found = await asyncio.gather(*(checker.check(o) for o in orders))
        return list(found), time.monotonic() - begun

    _, alone = asyncio.run(run([order(0)]))
    found, together = asyncio.run(run([order(n) for n in range(50)]))
    assert [c.verdict for c in found].count(Verdict.PASSED) == 40
    assert together < 1.5 * alone + 0.5


def test_an_engine_that_does_not_say_how_much_it_has_is_not_taken_for_idle() -> None:
    """Its zeros are no zeros: it may be too busy to answer."""

    class Silent(Client):
        async def fetch_load(
            self, auth_url: str, master: str, after: int, timeout_s: float, certificate: str | None = None
        ) -> LoadReport:
            return msgspec.structs.replace(LOAD, running=0, waiting=0, model_up=False)

    assert check(order(state=State.DRAINING), Log(READY), Silent()).in_flight is None


def test_an_answer_nobody_thought_of_fails_the_check_and_only_that(caplog: pytest.LogCaptureFixture) -> None:
    found = check(order(), Log(KeyError("odd")), Client())
    assert (found.verdict, found.why) == (Verdict.UNKNOWN, "health check: KeyError, a fault of ours")
    assert "a fault of ours" in caplog.text


def test_as_many_checks_as_hang_in_ssh_leave_others_their_turn() -> None:
    """150 hanging machines: more than any pool of threads would have."""
    hanging = frozenset(f"f/{n}" for n in range(1, 151))
    checker = HealthChecker(Client(), Log(READY, hanging), lambda label: "m", "vllm-13", 2.0, lambda: 1.0)  # type: ignore[arg-type]

    async def run() -> list[HealthCheck]:
        return list(await asyncio.gather(*(checker.check(order(n)) for n in [*range(1, 151), 151])))

    assert [c.verdict for c in asyncio.run(run())].count(Verdict.PASSED) == 1


def caused(by: BaseException) -> InstanceError:
    error = InstanceError("said the test")
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("trouble", "verdict", "met"),
    [
        (caused(TimeoutError()), Verdict.FAILED, False),
        (caused(ConnectionRefusedError(111, "refused")), Verdict.FAILED, False),
        (caused(socket.gaierror(-3, "Temporary failure in name resolution")), Verdict.FAILED, False),
        (caused(OSError(errno.ENETUNREACH, "no route")), Verdict.FAILED, False),
        (caused(OSError(errno.EMFILE, "too many open files")), Verdict.UNKNOWN, False),
        (sqlite3.OperationalError("database is locked"), Verdict.UNKNOWN, False),
        (RuntimeError("can't start new thread"), Verdict.UNKNOWN, False),
        (InstanceError("wanted 200, got 500"), Verdict.FAILED, True),
    ],
)
def test_a_check_says_whom_it_met_and_a_fault_of_ours_is_unknown(
    trouble: Exception, verdict: Verdict, met: bool
) -> None:
    """Field fault C2: a locked ledger made healthy instances fail."""

    class Troubled(Client):
        async def fetch_tokens(
            self, auth_url: str, master: str, count: int, timeout_s: float, certificate: str | None = None
        ) -> TokenBatch:
            raise trouble

    found = check(order(state=State.HOT, read_log=False), Log(READY), Troubled())
    assert (found.verdict, found.met) == (verdict, met)


def test_a_reason_of_a_check_is_safe_to_write_down() -> None:
    """Field fault A1: a lone surrogate in an error text ended the turn's journal."""
    found = check(order(), Log(InstanceError("\ud800\x1b[2J" + "x" * 100_000)), Client())
    found.why.encode()
    assert len(found.why) <= 300
    assert "\x1b" not in found.why


def test_a_stranger_behind_the_address_is_not_the_machine() -> None:
    found = check(order(), Log(HostKeyChanged("changed")), Client())
    assert (found.verdict, found.met) == (Verdict.FATAL, False)


# -- its own word, without ssh -------------------------------------------------------------------------

PINNED = "-----BEGIN CERTIFICATE-----\nsaid\n-----END CERTIFICATE-----\n"
NO_SSH = Log(LoginRanNothing("the fleet's key is not accepted (yet)"))
UNREACHED = Log(InstanceError("ssh: refused"))


def said(word: str, state: State = State.RUNNING) -> HealthCheckOrder:
    """A check of a machine that said so, signed, and so vouched for its certificate."""
    return replace(order(state=state), word=word, certificate=PINNED)


@pytest.mark.parametrize("ssh", [NO_SSH, UNREACHED, Log(HostKeyChanged("changed"))])
@pytest.mark.parametrize(
    ("word", "client", "verdict", "why"),
    [
        ("ready", Client(), Verdict.PASSED, "test prompt: 1 token(s)"),
        ("ready", Client(refuses=frozenset({"https://m1"})), Verdict.FAILED, "https://m1: expected a token"),
        ("loading: 40 %", Client(loads=True), Verdict.LOADING, "it says: loading: 40 %"),
        ("loading: 99 %", Client(), Verdict.PASSED, "test prompt: 1 token(s)"),  # its next word is under way
        ("failed: no GPU in the container", Client(loads=True), Verdict.FATAL, "it says: failed: no GPU"),
    ],
)
def test_a_machine_that_reaches_us_is_checked_without_ssh(
    ssh: Log, word: str, client: Client, verdict: Verdict, why: str
) -> None:
    client.certificates.clear()
    found = check(said(word), ssh, client)
    assert (found.verdict, found.why[: len(why)]) == (verdict, why)
    assert found.met or verdict is Verdict.FAILED
    assert set(client.certificates) == {PINNED}, "nothing goes to who shows another"


def test_a_word_goes_before_the_certificate_that_ssh_shows() -> None:
    client = Client()
    other = LogView(ready=True, certificate=PEM)
    assert check(said("ready", State.HOT), Log(other), client).verdict is Verdict.PASSED
    assert set(client.certificates) == {PINNED}


def test_ssh_is_the_second_source_of_a_machine_that_said_something_and_cannot_be_asked() -> None:
    view = LogView(ready=False, fatal="No CUDA GPUs are available")
    found = check(said("loading"), Log(view), Client(lost=True))
    assert (found.verdict, found.why) == (Verdict.FATAL, "fatal line in its log: No CUDA GPUs are available")
    found = check(said("loading"), UNREACHED, Client(lost=True))
    assert (found.verdict, found.met) == (Verdict.FAILED, False)


@pytest.mark.parametrize(("loads", "verdict"), [(False, Verdict.PASSED), (True, Verdict.LOADING)])
def test_a_machine_known_from_before_needs_neither_word_nor_ssh(loads: bool, verdict: Verdict) -> None:
    """As after a restart of the autoscaler, on a host whose ssh is slow that day."""
    known = replace(order(), certificate=PINNED)
    assert check(known, UNREACHED, Client(loads=loads)).verdict is verdict


def test_an_ssh_server_that_does_not_take_our_key_yet_is_met() -> None:
    """The key comes late on some hosts: that is no silence of the machine."""
    assert check(order(), NO_SSH, Client()).met
    assert not check(order(), UNREACHED, Client()).met


def test_a_machine_that_refuses_ssh_and_listens_elsewhere_is_met() -> None:
    """On some hosts nobody ever listens for ssh: unmet, it would bill for long after its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        found = check(
            replace(order(), auth_url=f"http://127.0.0.1:{there.getsockname()[1]}"), UNREACHED, Client()
        )
    assert (found.verdict, found.met) == (Verdict.FAILED, True)


# -- the log -------------------------------------------------------------------------------------------


def printed(*lines: str, certificate: str = "") -> str:
    """What the command prints."""
    return "\n".join(("", "FLEET-BEGIN", *lines, "FLEET-CERTIFICATE", "")) + certificate + "FLEET-END\n"


def test_lines_are_matched_as_substrings() -> None:
    assert parse(printed("READY")) == LogView(ready=True)
    assert parse(printed()) == LogView(ready=False)
    assert parse(printed(certificate="-----BEGIN\nxy\n")).certificate == "-----BEGIN\nxy\n"
    fatal = "(APIServer pid=7) No CUDA GPUs are available"
    assert parse(printed("READY", fatal)).fatal == fatal


GREETINGS = ("Welcome to vast.ai. If authentication fails, try again.\n", "\nEND\nFLEET-CERTIFICATE\nREADY\n")


@pytest.mark.parametrize("greeting", GREETINGS)
def test_what_a_login_says_before_and_after_is_not_looked_at(greeting: str) -> None:
    assert parse(greeting + printed("READY") + "logout\n") == LogView(ready=True)


@pytest.mark.parametrize("cut", ["", "READY\n", "\nFLEET-BEGIN\nREADY\nFLEET-CE", "no sessions\n"])
def test_a_reply_that_was_cut_short_or_of_another_program_says_nothing(cut: str) -> None:
    with pytest.raises(LoginRanNothing):
        parse(cut)


PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def test_the_shell_command_reads_the_log_of_this_boot(tmp_path: object) -> None:
    import subprocess

    home = str(tmp_path)
    (tmp_path / "fleet").mkdir()  # type: ignore[operator]
    log = tmp_path / "fleet" / "model.log"  # type: ignore[operator]

    def look(hot: bool) -> LogView:
        ran = subprocess.run(
            ["bash", "-c", grep_command(hot=hot)],
            env={"HOME": home, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        return parse(ran.stdout)

    assert look(False) == LogView(ready=False)
    log.write_text("INFO: Waiting\n")
    assert look(False) == LogView(ready=False)
    log.write_text(f"INFO:     {READY_LINE}\n")
    assert look(False) == LogView(ready=True)
    log.write_text("Serving now\nfleet: the model server answers\n")
    assert look(False) == look(True) == LogView(ready=True)
    log.write_text(f"INFO: x {FATAL_LINES[0]} y\n")
    assert look(False).fatal == FATAL_LINES[0]
    (tmp_path / "fleet" / "tls.crt").write_text(f"{PEM}{PEM}")  # type: ignore[operator]
    assert look(True).certificate == PEM, "the first of the file"
    assert look(True).fatal is None, "what kills a boot may be one request's error later"


@contextmanager
def ssh_server(answer: bytes, host_key: paramiko.PKey) -> Iterator[int]:
    """A real ssh server on loopback that answers every command with that."""

    class Server(paramiko.ServerInterface):
        def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
            return paramiko.common.AUTH_SUCCESSFUL

        def get_allowed_auths(self, username: str) -> str:
            return "publickey"

        def check_channel_request(self, kind: str, chanid: int) -> int:
            return paramiko.common.OPEN_SUCCEEDED

        def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
            def reply() -> None:
                channel.sendall(answer)
                channel.send_exit_status(0)
                channel.shutdown_write()  # a close could overtake paramiko's own "yes, it runs"

            threading.Thread(target=reply, daemon=True).start()
            return True

    listener = socket.create_server(("127.0.0.1", 0))
    transports: list[paramiko.Transport] = []

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(sock)
            transports.append(transport)
            transport.add_server_key(host_key)
            try:
                transport.start_server(server=Server())
            except (paramiko.SSHException, EOFError, OSError):
                transport.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=10)
        for transport in transports:
            transport.close()


def test_a_changed_host_key_is_refused() -> None:
    known: dict[str, str] = {}
    reader = SshLog(paramiko.ECDSAKey.generate(), lambda label, key: known.setdefault(label, key))
    with ssh_server(printed("READY").encode(), paramiko.ECDSAKey.generate()) as port:
        assert reader.read("f/1", "127.0.0.1", port, False, 10.0) == LogView(ready=True)
    with ssh_server(printed("READY").encode(), paramiko.ECDSAKey.generate()) as port:
        with pytest.raises(HostKeyChanged):
            reader.read("f/1", "127.0.0.1", port, False, 10.0)
        assert reader.read("f/2", "127.0.0.1", port, False, 10.0).ready


def test_an_ssh_that_accepts_and_never_answers_ends_with_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reader = SshLog(paramiko.ECDSAKey.generate(), lambda label, key: key)
        begun = time.monotonic()
        with pytest.raises(InstanceError):
            reader.read("f/1", "127.0.0.1", silent.getsockname()[1], False, 1.0)
        assert time.monotonic() - begun < 5.0


def test_an_ssh_that_never_stops_talking_is_not_listened_to_for_ever() -> None:
    reader = SshLog(paramiko.ECDSAKey.generate(), lambda label, key: key)
    with (
        ssh_server(b"x" * (MAX_OUTPUT + 1), paramiko.ECDSAKey.generate()) as port,
        pytest.raises(InstanceError, match="no end"),
    ):
        reader.read("f/1", "127.0.0.1", port, False, 10.0)


@pytest.mark.parametrize(
    "first", [b"SSH-2.0-" + b"x" * 1000, b"x" * 1000, b"line\n" * 200, b"SSH-2.0-a\r\n\0"]
)
def test_a_host_that_talks_without_end_costs_little(first: bytes) -> None:
    """Field fault A4: a banner without a newline took 0.7 of a core until the deadline."""

    def talk(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                while True:
                    peer.sendall(first)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        talker = threading.Thread(target=talk, args=(listener,), daemon=True)
        talker.start()
        reader = SshLog(paramiko.ECDSAKey.generate(), lambda label, key: key)
        begun = time.monotonic()
        with pytest.raises(InstanceError):
            reader.read("f/1", "127.0.0.1", listener.getsockname()[1], False, 15.0)
        took_s = time.monotonic() - begun
        talker.join(10)
    assert took_s < 8.0, "it ended because of the bytes, not at the deadline"
    assert not talker.is_alive()
