"""A client's side of the fleet: an httpx2 transport that takes a lease for each request and sends it there.

    client = OpenAI(
        http_client=httpx2.Client(transport=FleetTransport("http://127.0.0.1:8200")),
        base_url="http://fleet/v1",
        api_key="x",
    )

Path, query, headers and body go as they are; where to and with which token is what the lease says:

    request ─► POST /route ─► lease ─► instance ─► its answer, passed on as it comes
                 ▲                        │ no connection, wrong certificate, 401, 429, 503
                 └────────────────────────┘ before the first byte of an answer, and never after

Always true:
- the loadbalancer is told how long a prompt is and salted hashes of its beginning, and no byte of it;
- a prompt goes under TLS to the very certificate that the lease names, or stays on this machine;
- no proxy of the environment sees anything, and neither the user's API key nor the loadbalancer's goes to an
  instance;
- a token admits one request once, so a request whose kept-alive connection broke may be sent again with the
  same token: a 401 then says that the first one had been taken.

What is imported from here stays; it is loaded when it is first asked for, because the servers use only the
small files. Where it is:

    decides, and neither reads a clock nor opens anything       does
    options         what a transport can be told                transport         what both transports share
    token_estimate  how long a request is                       async_transport   AsyncFleetTransport
    prefix_hashes   the hashes, and where each was read         loop_side         what it has open in one loop
    leases          leases, POST /route and POST /done          async_connections aiohttp for it
    leases_ahead    leases fetched before they are needed       thread_transport  FleetTransport
    lease_keeper    leases at hand, and ends to be told         connection_pool   HTTP/1.1 for it
    call, reply     what is passed on, and what is for us       forks             what a fork does not share
    instance_names  which of it would lead to an instance       gateway           the same as a small server
    retry           one request: where next, and when to stop
    answer_pace     how fast its answer came
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleet_client.async_transport import AsyncAnswer, AsyncFleetTransport
    from fleet_client.call import Call, Timeouts
    from fleet_client.leases import ClientLease
    from fleet_client.reply import HttpReply
    from fleet_client.thread_transport import FleetTransport
    from fleet_client.token_estimate import TokenEstimate

_MODULES = {
    "AsyncAnswer": "async_transport",
    "AsyncFleetTransport": "async_transport",
    "Call": "call",
    "ClientLease": "leases",
    "FleetTransport": "thread_transport",
    "HttpReply": "reply",
    "Timeouts": "call",
    "TokenEstimate": "token_estimate",
}

__all__ = [
    "AsyncAnswer",
    "AsyncFleetTransport",
    "Call",
    "ClientLease",
    "FleetTransport",
    "HttpReply",
    "Timeouts",
    "TokenEstimate",
]


def __getattr__(name: str) -> Any:
    """Import a public name of this package when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
