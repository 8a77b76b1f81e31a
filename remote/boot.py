"""The steps at the beginning of an instance's boot, and after the death of its model server.

    python3 -m remote.boot begin        make fleet/boot anew, and a certificate
    python3 -m remote.boot fail_open    report that the requests that were under way have failed
    python3 -m remote.boot give_up WHY  tell the autoscaler why this machine will not serve

A program of its own, so that what it imports does not stay in the supervisor's memory.
"""

import os
import shutil
import signal
import ssl
import sys
import time

from remote import events, speaker, tokens

GIVEN = "/etc/instance"
"""Where Vast.ai puts a machine's certificate and key, .crt and .key, signed by its own authority."""

MOST_S = 60
"""Seconds for one step: a certificate and some files, or a message. The kernel ends one that takes longer."""

TRY_S = 5.0
"""Between two tries to tell the autoscaler."""

_OPENSSL = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=instance"
    " -keyout - -out -"
)
"""Makes a pair where Python has no cryptography; comes with the authorities' certificates, in every image."""


def begin(fleet: str) -> str:
    """Make the directory fleet/boot anew and return it: new boot id and keys, no tokens, no events."""
    boot = os.path.join(fleet, "boot")
    shutil.rmtree(boot, ignore_errors=True)
    os.mkdir(boot, 0o700)
    for name in ("boot_id", "local.key"):
        fd = os.open(os.path.join(boot, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as f:
            f.write(os.urandom(16).hex())
    tokens.make_store(boot)
    events.make_ring(boot)
    if not take_certificate(fleet, os.environ.get("FLEET_GIVEN_CERTIFICATE", GIVEN)):
        make_certificate(fleet)
    return boot


def take_certificate(fleet: str, given: str) -> bool:
    """Copy the pair given.crt and given.key to fleet/tls.crt and tls.key; return whether there is a pair.

    A pair that was made before stays as long as the disk does, so that what is known of it outlives a stop.
    """
    for path in (given, os.path.join(fleet, "tls")):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path + ".crt", path + ".key")
            if path == given:
                _write_pair(fleet, *(_read(given + end) for end in (".crt", ".key")))
        except OSError:  # also ssl.SSLError: one that is half there is none
            continue
        return True
    return False


def make_certificate(fleet: str) -> None:
    """Make a key and a certificate that it signs itself, as fleet/tls.key and tls.crt.

    The dates in it say nothing: callers know the certificate itself.
    """
    try:
        _write_pair(fleet, *_make_pair())
    except ImportError:
        with os.popen(_OPENSSL) as told:  # noqa: S605 a constant
            made = told.read().encode()
        at = made.index(b"-----BEGIN CERT")
        _write_pair(fleet, made[at:], made[:at])


def _make_pair() -> tuple[bytes, bytes]:
    from datetime import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "instance of a fleet")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2020, 1, 1))  # noqa: DTZ001 X.509 has UTC only
        .not_valid_after(datetime(2120, 1, 1))  # noqa: DTZ001
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), private


def _read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def _write_pair(fleet: str, certificate: bytes, key: bytes) -> None:
    for name, content in (("tls.key", key), ("tls.crt", certificate)):
        path = os.path.join(fleet, name)
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(content)
        os.replace(path + ".new", path)


def fail_open(fleet: str) -> int:
    """Record that all requests that have started and not ended have failed; return how many.

    Their model server is gone.
    """
    return events.Events(os.path.join(fleet, "boot")).fail_open()


def give_up(fleet: str, why: str) -> None:
    """Tell the autoscaler why this machine will not serve: one signed message, until it is taken."""
    url = os.environ.get("FLEET_READY_URL", "")
    digest = _read(os.path.join(fleet, "master.sha256")).decode()
    while url and speaker.say(url, digest, os.urandom(16).hex(), {"state": "failed", "why": why})[0] != 200:
        time.sleep(TRY_S)  # until MOST_S


def main() -> None:
    """Do the step that the command line names."""
    signal.alarm(MOST_S)
    fleet = os.path.expanduser("~/fleet")
    match sys.argv[1:]:
        case ["begin"]:
            begin(fleet)
        case ["fail_open"]:
            fail_open(fleet)
        case ["give_up", why]:
            give_up(fleet, why)


if __name__ == "__main__":
    main()
