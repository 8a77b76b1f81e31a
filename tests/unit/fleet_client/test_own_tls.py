"""Our own servers under TLS: what they show, what their callers trust, and files that change meanwhile."""

import http.client
import logging
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import jsonify, request

from fleet_client import own_tls
from fleet_client.network_trust import InTheClear, allow, clear_bind, clear_call
from fleet_client.own_tls import ServerTls, TrustedServer, server_tls
from process.errors import ConfigError
from tests.fake_fleet import make_certificate
from tests.web_server import call, served, wait_until
from web.app import make_app

Pair = tuple[str, str]

MINE, OTHER = make_certificate(), make_certificate()


def put(path: Path, text: str) -> Path:
    """Put another file in its place in one step, as certbot does."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.replace(path)
    return path


class Files:
    """A certificate and its key."""

    def __init__(self, folder: Path, pair: Pair = MINE) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.put(pair)

    def put(self, pair: Pair) -> None:
        """Replace both."""
        put(self.cert, pair[0])
        put(self.key, pair[1])

    def tls(self) -> ServerTls:
        """What a server with them shows."""
        tls = server_tls(self.cert, self.key)
        assert tls is not None
        return tls


@contextmanager
def serving(tls: ServerTls) -> Iterator[int]:
    """The port of a server under TLS."""
    app = make_app("under tls")

    @app.get("/scheme")
    def said() -> Any:
        return jsonify(scheme=request.scheme)

    with served(app, loopback=False, tls=tls) as port:
        yield port


def trusted(folder: Path, *pairs: Pair) -> TrustedServer:
    return TrustedServer("--x-cert", put(folder / "trusted.pem", "".join(pair[0] for pair in pairs)))


def connection(port: int, trust: TrustedServer) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=10.0, context=trust.context())


def ask(https: http.client.HTTPSConnection) -> bytes:
    https.request("GET", "/scheme")
    answer = https.getresponse()
    assert answer.status == 200
    return answer.read()


def test_a_server_shows_its_certificate_to_those_who_trust_it_and_speaks_nothing_else(tmp_path: Path) -> None:
    with serving(Files(tmp_path).tls()) as port:
        with closing(connection(port, trusted(tmp_path, MINE))) as https:
            assert ask(https) == b'{"scheme":"https"}\n'
        with closing(connection(port, trusted(tmp_path, OTHER, MINE))) as https:
            assert ask(https) == b'{"scheme":"https"}\n'
        with closing(connection(port, trusted(tmp_path, OTHER))) as https, pytest.raises(ssl.SSLError):
            ask(https)
        by_authority = http.client.HTTPSConnection("127.0.0.1", port, timeout=10.0)
        with closing(by_authority), pytest.raises(ssl.SSLError):
            ask(by_authority)
        with pytest.raises(OSError):
            call(port, "GET", "/scheme")
        with closing(connection(port, trusted(tmp_path, MINE))) as https:
            assert ask(https), "what was refused changed nothing"


def test_a_new_certificate_is_shown_to_new_connections_and_those_that_are_open_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(own_tls, "LOOK_S", 0.02)
    files = Files(tmp_path)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    with (
        caplog.at_level(logging.INFO, logger="tls"),
        serving(files.tls()) as port,
        closing(connection(port, trusted(old, MINE))) as https,
    ):
        assert ask(https)
        files.put(OTHER)
        wait_until(lambda: "in use from now on" in caplog.text, "the new certificate")
        assert ask(https), "it was dropped"
        with closing(connection(port, trusted(new, OTHER))) as another:
            assert ask(another)
        with closing(connection(port, trusted(old, MINE))) as late, pytest.raises(ssl.SSLError):
            ask(late)
        assert ask(https)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("bad", ["garbage", MINE[0], "", None], ids=["text", "another's", "empty", "gone"])
def test_a_bad_new_certificate_keeps_the_old_one_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: str | None
) -> None:
    monkeypatch.setattr(own_tls, "LOOK_S", 0.02)
    files = Files(tmp_path, OTHER)
    (tmp_path / "trust").mkdir()
    trust = trusted(tmp_path / "trust", OTHER, MINE)
    with caplog.at_level(logging.INFO, logger="tls"), serving(files.tls()) as port:
        if bad is None:
            files.cert.unlink()
        else:
            put(files.cert, bad)
        wait_until(lambda: "cannot be used; what was before stays in use" in caplog.text, "the complaint")
        with closing(connection(port, trust)) as https:
            assert ask(https)
        files.put(MINE)
        wait_until(lambda: "in use from now on" in caplog.text, "the good certificate")
        with closing(connection(port, trust)) as https:
            assert ask(https)
    assert [r.levelno for r in caplog.records] == [logging.WARNING, logging.INFO]
    assert str(files.cert) in caplog.text


def test_half_of_a_new_pair_is_not_complained_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path)
    tls = files.tls()
    before = tls.value
    put(files.cert, OTHER[0])
    tls.look()
    put(files.key, OTHER[1])
    tls.look()
    assert (tls.value, caplog.text) == (before, "")
    tls.look()
    assert tls.value is not before
    assert caplog.text == ""


def test_what_a_caller_trusts_is_read_again_too(tmp_path: Path) -> None:
    trust = trusted(tmp_path, OTHER)
    with serving(Files(tmp_path).tls()) as port:
        with closing(connection(port, trust)) as https, pytest.raises(ssl.SSLError):
            ask(https)
        trusted(tmp_path, OTHER, MINE)  # the same file
        trust.context()
        with closing(connection(port, trust)) as https:
            assert ask(https)


def locked(key: str) -> str:
    """The same key with a password."""
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:secret"]
    return subprocess.run(command, input=key, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        (MINE[0], OTHER[1], "no certificate with its key"),
        (MINE[0], MINE[0], "no certificate with its key"),
        ("garbage", MINE[1], "no certificate with its key"),
        (MINE[0], locked(MINE[1]), "no certificate with its key"),
        (MINE[0], None, "key.pem cannot be read: No such file"),
        (None, MINE[1], "cert.pem cannot be read: No such file"),
    ],
    ids=["another's key", "no key", "no certificate", "a password", "key not there", "not there"],
)
def test_what_cannot_be_shown_is_said_at_the_start(
    tmp_path: Path, cert: str | None, key: str | None, said: str
) -> None:
    files = Files(tmp_path)
    for path, text in ((files.cert, cert), (files.key, key)):
        if text is None:
            path.unlink()
        else:
            put(path, text)
    with pytest.raises(ConfigError, match=said):
        files.tls()


def test_a_key_that_others_can_read_is_refused_and_both_files_are_wanted(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"--tls-key .* can be read by others: chmod 600"):
        files.tls()
    for pair in ((files.cert, None), (None, files.key)):
        with pytest.raises(ConfigError, match="--tls-cert and --tls-key: wanted both or none"):
            server_tls(*pair)
    assert server_tls(None, None) is None


@pytest.mark.parametrize("text", ["", "garbage", MINE[1], "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_certificate_to_trust_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--x-cert .*/t\.pem: wanted certificates in PEM"):
        TrustedServer("--x-cert", put(tmp_path / "t.pem", text))
    assert TrustedServer("--x-cert", None).context() is None


def test_the_openssl_line_of_the_docs_makes_a_pair_that_works(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "operating.md"
    (line,) = [one for one in page.read_text().splitlines() if one.startswith("openssl req")]
    folder = tmp_path / "tls"
    folder.mkdir()
    subprocess.run(["sh", "-ec", f"umask 077; {line}"], cwd=folder, check=True, capture_output=True)
    cert, key = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    tls = server_tls(cert, key)
    assert tls is not None
    with serving(tls) as port, closing(connection(port, TrustedServer("--x-cert", cert))) as https:
        assert ask(https)


# -- in the clear ------------------------------------------------------------------------------------------


def test_plain_http_beyond_this_machine_is_what_is_in_the_clear() -> None:
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://10.0.0.1:1", ""):
        assert clear_call("--to", url, "keys") == []
    assert clear_call("--to", "http://10.0.0.1:1", "keys") == [InTheClear("--to http://10.0.0.1:1", "keys")]
    assert clear_bind("127.0.0.1", "keys", encrypted=False) == []
    assert clear_bind("0.0.0.0", "keys", encrypted=True) == []
    assert [way.flag for way in clear_bind("0.0.0.0", "keys", encrypted=False)] == ["--host 0.0.0.0"]


def test_it_is_refused_and_with_trust_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    ways = [*clear_bind("::", "keys", encrypted=False), *clear_call("--to", "http://example.org", "tokens")]
    with pytest.raises(ConfigError) as refused:
        allow(ways, trust_network=False)
    assert "--host :: would be plain HTTP beyond this machine, and shows keys" in str(refused.value)
    assert "--tls-cert and --tls-key, or --trust-network" in str(refused.value)
    allow(ways, trust_network=True)
    said = [r.getMessage() for r in caplog.records]
    assert said == [
        "--host :: is plain HTTP beyond this machine: all who can listen there have keys",
        "--to http://example.org is plain HTTP beyond this machine: all who can listen there have tokens",
    ]
    allow([], trust_network=False)
