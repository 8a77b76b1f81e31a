"""TLS to a machine whose certificate is known beforehand: it must show that certificate and no other.

A rented machine has no name that a certificate authority could vouch for. The autoscaler vouches for it: it
reads its certificate over ssh (fleet/outside/ssh_log.py). Every program that talks to the machine is given
that certificate, and the handshake fails with any other. Names and dates in it say nothing then, so they are
not looked at, and a clock that is wrong by minutes changes nothing.
"""

import base64
import functools
import hashlib
import ssl
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fleet_client.loopback import is_loopback_url

LONGEST = 16_384
"""Most characters of a certificate that is looked at; one with an RSA key of 4096 bits has 2,000."""

_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL's x509_vfy.h; Python's ssl has no name for it."""


class BadAddress(ValueError):
    """An address that prompts and tokens must not be sent to; the text says why."""


@functools.lru_cache(maxsize=4096)
def pinned_context(certificate: str) -> ssl.SSLContext:
    """Return a client's TLS context that trusts only that certificate (PEM); raise ValueError."""
    _parsed(certificate)
    return _anchored_in(certificate)


def trusting(certificates: str) -> ssl.SSLContext:
    """Return a client's TLS context that trusts only these certificates (PEM); raise ValueError."""
    try:
        x509.load_pem_x509_certificates(certificates.encode())
    except ValueError:
        raise ValueError("wanted certificates in PEM") from None
    return _anchored_in(certificates)


def _anchored_in(certificates: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # Each is the anchor itself, whoever signed it, and however it was made.
    # As numbers: ~ of a flag has the bits that Python knows, so &= would take the one it does not know away.
    flags = int(context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) | _NO_CHECK_TIME
    context.verify_flags = ssl.VerifyFlags(flags & ~int(ssl.VERIFY_X509_STRICT))
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_verify_locations(cadata=certificates)
    except ssl.SSLError as e:
        raise ValueError(f"not a certificate that TLS can use: {e.reason}") from None
    return context


@functools.lru_cache(maxsize=16_384)
def public_key_sha256(certificate: str) -> str:
    """Return the SHA-256 of a certificate's public key in base64, for `curl --pinnedpubkey sha256//…`.

    Raises ValueError for what is no certificate.
    """
    key = _parsed(certificate).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


def _parsed(certificate: str) -> x509.Certificate:
    one = len(certificate) <= LONGEST and certificate.count("-----BEGIN") == 1
    try:
        return x509.load_pem_x509_certificate(certificate.encode() if one else b"")
    except ValueError:
        raise ValueError("wanted one certificate in PEM") from None


def context_for(url: str, certificate: str | None) -> ssl.SSLContext | None:
    """Return the TLS context for calls to a URL, with that certificate; None: in the clear, on loopback.

    Raises BadAddress for everything else.
    """
    check(url, certificate)
    https = urlsplit(url).scheme == "https"
    return pinned_context(certificate) if https and certificate is not None else None


def check(url: str, certificate: str | None) -> None:
    """Raise BadAddress where `context_for` would: nothing may be sent to that URL."""
    scheme = urlsplit(url).scheme
    if scheme == "https" and certificate is None:
        raise BadAddress("https, but its certificate is not known")
    if scheme != "https" and (scheme != "http" or not is_loopback_url(url)):
        raise BadAddress("in the clear, which is for loopback only")
