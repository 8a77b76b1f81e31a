"""TLS of our own servers: the certificates that they show, and that their callers trust.

    autoscaler    --tls-cert a.pem --tls-key a.key  ◄─ https ─  loadbalancer         --autoscaler-cert a.pem
    loadbalancer  --tls-cert b.pem --tls-key b.key  ◄─ https ─  autoscaler, gateway  --loadbalancer-cert b.pem

A caller that is given certificates trusts them and no others, whatever names and dates they have, as it is
with instances (tls_pins.py). Without any it trusts the authorities of its machine, and looks at the name.
Files are read again when they have changed.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fleet_client.errors import ConfigError
from fleet_client.private_files import check_private
from fleet_client.text_files import read_text
from fleet_client.tls_pins import trusting

log = logging.getLogger("tls")

LOOK_S = 1.0
"""Seconds between two looks at the files of a server's certificate."""

T = TypeVar("T")

_Stamps = tuple[tuple[int, int, int] | None, ...]


class Reread(Generic[T]):
    """A value that is made of files, and made again when they change; unusable files leave it as it is."""

    def __init__(self, paths: Sequence[Path], make: Callable[[], T]) -> None:
        """Read the files at these paths with `make`, which returns the value, and keep it as `value`.

        Raises what `make` raises for files that cannot be used, a ConfigError.
        """
        self._paths = paths
        self._make = make
        self._read = self._seen = self._stamps()
        self.value = make()

    def look(self) -> None:
        """Read the files again if they have changed, and did not change since the last look.

        Two files that belong together are written one after the other. One line in the log says what came of
        it.
        """
        now = self._stamps()
        if now != self._seen:
            self._seen = now
        elif now != self._read:
            self._read = now
            names = " and ".join(map(str, self._paths))
            try:
                self.value = self._make()
                log.info("%s changed: in use from now on", names)
            except ConfigError as e:
                log.warning("%s changed, and cannot be used; what was before stays in use: %s", names, e)

    def _stamps(self) -> _Stamps:
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
            except OSError:
                found.append(None)
        return tuple(found)

    async def watch(self) -> None:
        """Look at the files every LOOK_S; never return."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()


ServerTls = Reread[ssl.SSLContext]
"""What a server shows: new connections have the value of that moment, those that are open go on."""


def server_tls(certificate: Path | None, key: Path | None) -> ServerTls | None:
    """Return the TLS context of a server with these files; None without any. Raises ConfigError."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--tls-cert and --tls-key: wanted both or none")
    return Reread((certificate, key), lambda: _server_context(certificate, key))


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    check_private(key, "--tls-key")
    read_text(key, "--tls-key")
    read_text(certificate, "--tls-cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")  # else one with a password asks for it
    except (ssl.SSLError, OSError) as e:
        why = getattr(e, "reason", None) or e.strerror or e
        raise ConfigError(
            f"--tls-cert {certificate} and --tls-key {key}: no certificate with its key: {why}"
        ) from None
    return context


class TrustedServer:
    """The certificates that a caller trusts of one of our servers."""

    def __init__(self, flag: str, path: Path | None) -> None:
        """Trust the certificates in a PEM file; None: what the machine's authorities vouch for, by name.

        Raises ConfigError that begins with the flag.
        """
        self._pins = None if path is None else Reread((path,), lambda: _client_context(flag, path))

    def context(self) -> ssl.SSLContext | None:
        """Return the TLS context for calls, by the file as it is now; None for the machine's authorities."""
        if self._pins is None:
            return None
        self._pins.look()
        return self._pins.value


ANY_AUTHORITY = TrustedServer("", None)
"""What the machine's authorities vouch for."""


def _client_context(flag: str, path: Path) -> ssl.SSLContext:
    try:
        return trusting(read_text(path, flag))
    except ValueError as e:
        raise ConfigError(f"{flag} {path}: {e}") from None


def scheme(tls: object) -> str:
    """Return the scheme of a server's URL, https or http. tls: None for http."""
    return "http" if tls is None else "https"
