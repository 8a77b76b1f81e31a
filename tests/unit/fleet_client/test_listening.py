"""Who may listen where."""

import pytest

from fleet_client.listening import bind_socket, check_bind
from process.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_bind(host, 8200, keys_present=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_listening_elsewhere_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        check_bind(host, 8200, keys_present=False)
    check_bind(host, 8200, keys_present=True)


def test_a_port_in_use_is_a_config_error() -> None:
    with (
        bind_socket("127.0.0.1", 0) as sock,
        pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:"),
    ):
        bind_socket("127.0.0.1", sock.getsockname()[1])
    for host, port in (("127.0.0.1", 70_000), ("no-such-host.invalid", 80)):
        with pytest.raises(ConfigError, match="cannot listen"):
            bind_socket(host, port)
