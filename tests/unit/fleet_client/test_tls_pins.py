"""Whoever has another certificate than the one that is known of a machine learns nothing and gets nothing."""

import asyncio
import base64
import datetime
import hashlib
import random
import socket
import ssl
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from autoscaler import InstanceSet
from dispatch.outside.service import LoadBalancerService
from engine.profiles import get_profile
from fleet.deadlines import Deadlines
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.limits import Limits
from fleet.outside.health_checker import HealthChecker
from fleet.outside.ssh_log import LogView
from fleet.states import State
from fleet_client.tls_pins import LONGEST, BadAddress, context_for, pinned_context, public_key_sha256
from instance_client import InstanceClient, NotStarted, WrongCertificate
from loadbalancer import LoadBalancer
from loadbalancer_server import create_app
from process.errors import InstanceError
from remote import boot as boots
from remote import events, tokens
from remote.auth_server import create_app as create_auth_server
from remote.events import Events
from remote.model_load import ModelLoad
from remote.tokens import Gate, Issuer
from tests.asgi_client import AsgiClient
from tests.fake_fleet import FakeInstance, make_certificate
from tests.fleet_world import Contract
from tests.loadbalancer_app import CONTROL, HOT
from tests.messages import hot_set, load_report, token_batch
from tests.waiting import wait_for
from web.keys import AccessKeys

PROMPT, TOKEN = "a prompt that is secret", "token-that-is-secret"
BODY = {"model": "m", "prompt": PROMPT, "max_tokens": 3}
PATIENT = aiohttp.ClientTimeout(total=10.0)

Pair = tuple[str, str]
T = TypeVar("T")


def signed_by(key_pem: str, name: str = "instance") -> Pair:
    """Another certificate, with another key, that the owner of that key has signed."""
    authority = serialization.load_pem_private_key(key_pem.encode(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    return certificate_of(key, authority, name)


def same_key(key_pem: str) -> Pair:
    """Another certificate with the same key, signed by it."""
    key = serialization.load_pem_private_key(key_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return certificate_of(key, key, "another name")


def certificate_of(key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, name: str) -> Pair:
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "instance")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(by, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM).decode(), pem.decode()


MINE = make_certificate()
OTHER = make_certificate()


@pytest.fixture
def serve() -> Iterator[Callable[[Pair | None], FakeInstance]]:
    """Makes instances with that certificate."""
    made: list[FakeInstance] = []

    def one(pair: Pair | None) -> FakeInstance:
        made.append(FakeInstance(len(made) + 1, pair))
        return made[-1]

    yield one
    for server in made:
        server.stop()


def shake_hands(server: FakeInstance, certificate: str) -> None:
    """A handshake with what must have that certificate; raises ssl.SSLError."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        pinned_context(certificate).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        assert secure.version() in ("TLSv1.2", "TLSv1.3")


def ask(call: Callable[[InstanceClient], Awaitable[T]]) -> T:
    """What the call gives."""

    async def both() -> T:
        async with InstanceClient() as client:
            return await call(client)

    return asyncio.run(both())


# -- one certificate and no other --------------------------------------------------------------------------


@pytest.mark.parametrize("days", [(-30, 30), (-30, -1), (1, 30), (-3650, -3000)])
def test_a_machine_is_known_by_its_certificate_whatever_the_dates_and_names_in_it(
    days: tuple[int, int], serve: Callable[[Pair], FakeInstance]
) -> None:
    pair = make_certificate(days)
    shake_hands(serve(pair), pair[0])


def test_a_certificate_that_somebody_else_signed_is_its_own_anchor(
    serve: Callable[[Pair], FakeInstance],
) -> None:
    """As Vast.ai's machines have them: signed by its authority, for another name."""
    pair = signed_by(MINE[1], name="some.where.example")
    shake_hands(serve(pair), pair[0])


@pytest.mark.parametrize(
    "shown",
    [OTHER, signed_by(MINE[1]), make_certificate((-30, -1))],
    ids=["another", "signed by its key", "expired"],
)
def test_every_other_certificate_is_refused(shown: Pair, serve: Callable[[Pair], FakeInstance]) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(serve(shown), MINE[0])


def test_another_certificate_of_the_same_key_is_refused(serve: Callable[[Pair], FakeInstance]) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(serve(same_key(MINE[1])), MINE[0])


def test_the_hash_of_a_public_key_is_what_curl_wants() -> None:
    """openssl x509 -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64"""
    pem = x509.load_pem_x509_certificate(MINE[0].encode()).public_key()
    text = pem.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = base64.b64decode(b"".join(text.splitlines()[1:-1]))
    assert public_key_sha256(MINE[0]) == base64.b64encode(hashlib.sha256(der).digest()).decode()
    assert public_key_sha256(MINE[0]) == public_key_sha256(same_key(MINE[1])[0])
    assert public_key_sha256(MINE[0]) != public_key_sha256(OTHER[0])


@pytest.mark.parametrize(
    "pem",
    [
        "",
        "garbage",
        MINE[0] + OTHER[0],
        MINE[1],
        MINE[0] + MINE[1],
        MINE[0][:200],
        MINE[0].replace("M", "!"),
        MINE[0] + "x" * LONGEST,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ],
)
def test_what_is_not_one_certificate_is_refused(pem: str) -> None:
    for use in (pinned_context, public_key_sha256):
        with pytest.raises(ValueError, match="wanted one certificate in PEM"):
            use(pem)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://127.9.9.9:1"]
)
def test_in_the_clear_on_loopback_only(url: str) -> None:
    assert context_for(url, None) is None
    assert context_for(url, MINE[0]) is None


@pytest.mark.parametrize(
    ("url", "certificate"),
    [
        ("http://10.0.0.1:8000", None),
        ("http://10.0.0.1:8000", MINE[0]),
        ("http://127.0.0.1.example.com:1", None),
        ("http://localhost.example:1", None),
        ("http://0.0.0.0:1", None),
        ("http://127.0.0.1@10.0.0.1:1", None),
        ("https://10.0.0.1:8000", None),
        ("https://127.0.0.1:8000", None),
        ("ftp://127.0.0.1:1", MINE[0]),
        ("127.0.0.1:1", None),
        ("", None),
    ],
)
def test_an_address_that_prompts_must_not_be_sent_to_is_refused(url: str, certificate: str | None) -> None:
    with pytest.raises(BadAddress):
        context_for(url, certificate)
    with pytest.raises(NotStarted):
        ask(lambda c: c.stream(url, TOKEN, BODY, PATIENT, certificate))


# -- the instance's own ------------------------------------------------------------------------------------


def loads(fleet: Path) -> str:
    """The certificate that a server there would show."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(fleet / "tls.crt", fleet / "tls.key")
    return (fleet / "tls.crt").read_text()


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the host may put a pair; nothing is there yet."""
    path = tmp_path / "given"
    monkeypatch.setenv("FLEET_GIVEN_CERTIFICATE", str(path))
    (tmp_path / "fleet").mkdir()
    return path


def test_a_first_boot_makes_a_certificate_that_later_boots_keep(given: Path) -> None:
    fleet = given.parent / "fleet"
    boots.begin(str(fleet))
    made = loads(fleet)
    pinned_context(made)
    for name in ("tls.crt", "tls.key"):
        assert stat.S_IMODE((fleet / name).stat().st_mode) == 0o600
    boots.begin(str(fleet))
    assert loads(fleet) == made
    assert sorted(p.name for p in fleet.iterdir()) == ["boot", "tls.crt", "tls.key"]


def test_a_broken_certificate_is_made_anew(given: Path) -> None:
    fleet = given.parent / "fleet"
    boots.begin(str(fleet))
    made = loads(fleet)
    (fleet / "tls.key").write_text("")
    boots.begin(str(fleet))
    assert loads(fleet) != made


def test_the_pair_that_the_host_gives_is_taken(given: Path) -> None:
    fleet = given.parent / "fleet"
    boots.begin(str(fleet))
    given.with_suffix(".crt").write_text(MINE[0])
    given.with_suffix(".key").write_text(MINE[1])
    boots.begin(str(fleet))
    assert loads(fleet) == MINE[0]
    assert stat.S_IMODE((fleet / "tls.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "pair", [(MINE[0], None), (None, MINE[1]), (MINE[0], OTHER[1]), ("x", "y"), ("", "")]
)
def test_a_pair_that_is_broken_or_half_there_is_not_taken(
    pair: tuple[str | None, str | None], given: Path
) -> None:
    fleet = given.parent / "fleet"
    for suffix, text in zip((".crt", ".key"), pair, strict=True):
        if text is not None:
            given.with_suffix(suffix).write_text(text)
    boots.begin(str(fleet))
    assert loads(fleet) != MINE[0]


# -- who talks to an instance ------------------------------------------------------------------------------


class Impostor:
    """Has another certificate, and notes every byte: those it could read, and those on the wire."""

    def __init__(self, pair: Pair, directory: Path) -> None:
        both = directory / "both.pem"
        both.write_text("".join(pair))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(both)
        self.wire = self.read = b""
        self.connections = 0
        self.ended = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with sock:
                sock.settimeout(10.0)
                self._listen(sock)
            self.ended += 1

    def _listen(self, sock: socket.socket) -> None:
        """TLS by hand, so that all that comes is seen, also after a handshake that failed."""
        came, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.context.wrap_bio(came, out, server_side=True)
        shaken = False
        try:
            while raw := sock.recv(65_536):
                self.wire += raw
                came.write(raw)
                try:
                    if not shaken:
                        tls.do_handshake()
                        shaken = True
                    self.read += tls.read(65_536)
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError:
                    continue
                sock.sendall(out.read())
        except OSError:
            return

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(15)


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    made = Impostor(OTHER, tmp_path)
    yield made
    made.stop()


@pytest.mark.parametrize(
    "call",
    [
        lambda c, url: c.fetch_tokens(url, TOKEN, 5, 10.0, MINE[0]),
        lambda c, url: c.fetch_load(url, TOKEN, 0, 10.0, MINE[0]),
        lambda c, url: c.test_prompt(url, TOKEN, BODY, 10.0, MINE[0]),
        lambda c, url: c.stream(url, TOKEN, BODY, PATIENT, MINE[0]),
    ],
    ids=["tokens", "load", "test prompt", "stream"],
)
def test_who_has_another_certificate_is_told_nothing(
    call: Callable[[InstanceClient, str], Awaitable[object]], impostor: Impostor
) -> None:
    with pytest.raises(WrongCertificate) as refused:
        ask(lambda c: call(c, f"https://127.0.0.1:{impostor.port}"))
    wait_for("its connections end", lambda: impostor.ended == impostor.connections > 0)
    assert impostor.wire[:1] == b"\x16", "a handshake came"
    assert impostor.read == b""
    for secret in (TOKEN, PROMPT, "Bearer", "POST", "GET"):
        assert secret.encode() not in impostor.wire
    assert TOKEN not in str(refused.value)


def test_in_the_clear_nothing_is_connected_to_off_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **more: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", never)
    monkeypatch.setattr(socket.socket, "connect", never)
    url = "http://192.0.2.1:8000"
    for certificate in (None, MINE[0]):
        with pytest.raises(NotStarted, match="in the clear"):
            ask(lambda c, pem=certificate: c.stream(url, TOKEN, BODY, PATIENT, pem))  # type: ignore[misc]
        with pytest.raises(InstanceError, match="in the clear"):
            ask(lambda c, pem=certificate: c.fetch_tokens(url, TOKEN, 1, 5.0, pem))  # type: ignore[misc]


def test_with_the_right_certificate_it_is_served(serve: Callable[[Pair], FakeInstance]) -> None:
    server = serve(MINE)
    done = ask(lambda c: c.stream(server.address, server.token(), BODY, PATIENT, MINE[0]))
    assert (done.status, done.completion_tokens) == (200, 5)


# -- health checks -----------------------------------------------------------------------------------------


class Ssh:
    """Shows a log that is ready, and a certificate."""

    def __init__(self, certificate: str | None) -> None:
        self.certificate = certificate

    def read(self, label: str, host: str, port: int, hot: bool, timeout_s: float) -> LogView:
        return LogView(ready=True, certificate=self.certificate)


def health_check(port: int, ssh: Ssh, known: str | None = None) -> HealthCheck:
    url = f"http://127.0.0.1:{port}"
    order = HealthCheckOrder("fleet/1", 1, State.RUNNING, ("127.0.0.1", 22), url, url, True, known)

    async def both() -> HealthCheck:
        async with InstanceClient() as client:
            checker = HealthChecker(client, ssh, lambda _: TOKEN, "m", 10.0, lambda: 10.0)  # type: ignore[arg-type]
            return await checker.check(order)

    return asyncio.run(both())


@pytest.mark.parametrize("known", [None, MINE[0], OTHER[0]])
def test_a_port_with_another_certificate_than_ssh_showed_fails_and_says_why(
    known: str | None, impostor: Impostor
) -> None:
    """Also when the port has the one of the boot before: what ssh shows now is what counts."""
    check = health_check(impostor.port, Ssh(MINE[0]), known)
    assert check.verdict is Verdict.FAILED
    assert "does not have the certificate that is known of it" in check.why
    assert check.certificate == MINE[0]
    assert impostor.read == b""


def running() -> tuple[InstanceSet, Contract, str]:
    """One running instance, not yet known to be ready."""
    profile = get_profile("vllm-13")
    fleet = InstanceSet("fleet", profile, Limits(4, 10.0), Deadlines.for_profile(profile, 1.0), 1.0)
    contract = Contract(7, "fleet/1", 107, 0.4, status="running")
    fleet.observe([contract.row()], (), 1.0)
    (i,) = fleet
    fleet.checks_due(2.0)
    assert i.state is State.RUNNING
    return fleet, contract, i.label


def test_a_certificate_that_a_check_read_is_in_every_address_from_then_on() -> None:
    fleet, contract, label = running()
    one = fleet[label]
    assert (one.address or "").startswith("http://")
    fleet.judge(HealthCheck(label, 3.0, Verdict.FAILED, "another certificate", certificate=MINE[0]), 3.0)
    assert fleet.serving() == [], "it is not hot"
    fleet.judge(HealthCheck(label, 4.0, Verdict.PASSED, "test prompt", certificate=MINE[0]), 4.0)
    assert fleet.serving() == [one]
    fleet.observe([contract.row()], (), 5.0)
    assert (one.address, one.auth_url) == ("https://127.0.0.1:22007", "https://127.0.0.1:21007")
    version = fleet.hot_version
    fleet.judge(HealthCheck(label, 6.0, Verdict.PASSED, "test prompt", certificate=MINE[0]), 6.0)
    fleet.judge(HealthCheck(label, 7.0, Verdict.PASSED, "test prompt"), 7.0)
    assert (fleet.hot_version, one.certificate) == (version, MINE[0])
    fleet.judge(HealthCheck(label, 8.0, Verdict.PASSED, "test prompt", certificate=OTHER[0]), 8.0)
    assert fleet.hot_version > version, "loadbalancers must be told"
    assert one.certificate == OTHER[0]


# -- the loadbalancer --------------------------------------------------------------------------------------


def hot(**what: object) -> dict[str, object]:
    """A hot set of one."""
    return {**HOT, "instances": [{**HOT["instances"][0], **what}]}


def test_where_a_client_met_another_certificate_we_look_ourselves_at_once() -> None:
    balancer = LoadBalancer(random.Random(1), lambda token: token[-16:])
    desk = LoadBalancerService(balancer, lambda: 1_700_000_000.0)
    client = AsgiClient(create_app(desk, AccessKeys(CONTROL)))
    https = {"address": "https://10.0.0.1:8000", "auth_url": "https://10.0.0.1:3000", "certificate": MINE[0]}
    desk.hot_set(hot_set(hot(**https)))
    for refill in balancer.refills(desk.clock()):
        batch = token_batch([f"token-{n:016d}" for n in range(400)])
        balancer.complete_refill(refill, batch, desk.clock())
    lease = client.post("/route", json={"work": 10}).get_json()
    assert (lease["certificate"], lease["public_key_sha256"]) == (MINE[0], public_key_sha256(MINE[0]))
    done = {"request_id": lease["request_id"], "outcome": "failed", "why": "wrong_certificate"}
    assert client.post("/done", json=done).status_code == 200
    row = client.get("/status").get_json()["instances"][0]
    assert (row["failures"], row["unfinished"]) == (1, 0)
    [poll] = balancer.polls(desk.clock())
    assert poll.address_too, "over the address and certificate that clients have"
    balancer.complete_poll(poll, load_report(), desk.clock(), reached=False)
    assert client.get("/status").get_json()["instances"][0]["in_queue"] is False
    assert client.post("/route", json={"work": 10}).status_code == 503


@pytest.mark.parametrize(
    "what",
    [
        {"address": "http://10.0.0.1:8000"},
        {"address": "https://10.0.0.1:8000"},
        {"auth_url": "http://10.0.0.1:3000", "certificate": MINE[0]},
        {"address": "https://10.0.0.1:8000", "certificate": "garbage"},
        {"address": "https://10.0.0.1:8000", "certificate": MINE[0] + OTHER[0]},
    ],
)
def test_a_hot_set_that_tells_to_send_in_the_clear_is_refused(what: dict[str, str]) -> None:
    desk = LoadBalancerService(LoadBalancer(random.Random(1), str), lambda: 1.0)
    client = AsgiClient(create_app(desk, AccessKeys(CONTROL)))
    headers = {"Authorization": f"Bearer {CONTROL}"}
    answer = client.put("/hot", json=hot(**what), headers=headers)
    assert answer.status_code == 400
    assert desk.balancer.instances.hot_set is None


# -- clocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong_s", [-300.0, 300.0])
def test_a_clock_that_is_five_minutes_wrong_changes_nothing(
    wrong_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Pair], FakeInstance]
) -> None:
    """The instance's: its certificate, its tokens and the leases that are made of them stay good."""
    right = time.time()
    tokens.make_store(str(tmp_path))
    events.make_ring(str(tmp_path))
    monkeypatch.setattr(time, "time", lambda: right + wrong_s)
    monkeypatch.setenv("FLEET_GIVEN_CERTIFICATE", str(tmp_path / "none"))
    boots.make_certificate(str(tmp_path))
    app = create_auth_server(
        hashlib.sha256(b"master").hexdigest(),
        "boot-1",
        Issuer(str(tmp_path), time.monotonic()),
        Events(str(tmp_path)),
        lambda: ModelLoad(),
    )
    said = AsgiClient(app).post("/tokens", json={"count": 300}, headers={"Authorization": "Bearer master"})
    batch = said.get_json()
    monkeypatch.undo()
    assert batch["expires_at"] == pytest.approx(right + wrong_s + batch["expires_in_s"], abs=30.0)

    made = LoadBalancer(random.Random(1), lambda token: token)
    desk = LoadBalancerService(made, lambda: right)
    desk.hot_set(hot_set(HOT))
    (refill,) = made.refills(right)
    made.complete_refill(refill, token_batch(batch["tokens"], batch["expires_in_s"], batch["boot_id"]), right)
    lease = AsgiClient(create_app(desk, AccessKeys(CONTROL))).post("/route", json={"work": 10}).get_json()
    assert lease["expires_in_s"] == pytest.approx(60.0)
    assert lease["expires_at"] == pytest.approx(right + 60.0, abs=0.01)
    gate = Gate(str(tmp_path))
    assert gate.take(lease["token"], time.monotonic())
    assert not gate.take(lease["token"], time.monotonic())

    pair = ((tmp_path / "tls.crt").read_text(), (tmp_path / "tls.key").read_text())
    shake_hands(serve(pair), pair[0])


def test_an_rsa_certificate_will_do(serve: Callable[[Pair], FakeInstance]) -> None:
    """Vast.ai's are; ours are of an elliptic curve."""
    pair = make_certificate(key=rsa.generate_private_key(public_exponent=65537, key_size=2048))
    shake_hands(serve(pair), pair[0])


def test_the_certificate_of_an_instance_is_the_only_one_that_counts() -> None:
    """Not even one that the system's authorities vouch for would do."""
    context = pinned_context(make_certificate()[0])
    assert len(context.get_ca_certs()) <= 1
    assert context.verify_mode is ssl.CERT_REQUIRED
