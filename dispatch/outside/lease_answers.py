"""The answers of POST /route: leases encoded as JSON."""

from collections.abc import Sequence

import msgspec

from dispatch.lease import Lease
from fleet_client.tls_pins import public_key_sha256
from web.messages.hot_set import HotInstance
from web.messages.leases import InstanceCertificate, LeaseAnswer, LeaseBatch

_encode = msgspec.json.Encoder().encode


def encode_lease(lease: Lease, model: str, now: float) -> bytes:
    """Return the JSON of one lease, with the certificate of its instance. model: name of the hot model."""
    certificate = lease.spec.certificate
    key = None if certificate is None else public_key_sha256(certificate)
    return _encode(_answer(lease, model, now, certificate, key))


def encode_leases(leases: Sequence[Lease], model: str, now: float) -> bytes:
    """Return the JSON of a batch of leases, with the certificate of each instance once."""
    instances: dict[int, HotInstance] = {lease.instance_id: lease.spec for lease in leases}
    certificates = {
        i: InstanceCertificate(told.certificate, public_key_sha256(told.certificate))
        for i, told in instances.items()
        if told.certificate is not None
    }
    return _encode(LeaseBatch([_answer(lease, model, now) for lease in leases], certificates))


def _answer(
    lease: Lease, model: str, now: float, certificate: str | None = None, key: str | None = None
) -> LeaseAnswer:
    return LeaseAnswer(
        lease.spec.address,
        lease.token,
        lease.request_id,
        lease.instance_id,
        model,
        round(lease.expires_at, 3),
        round(lease.expires_at - now, 3),
        certificate,
        key,
        round(lease.first_token_s, 3),
    )
