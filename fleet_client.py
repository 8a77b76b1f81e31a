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

What is imported from here stays. Where it is:

    decides, and neither reads a clock nor opens anything       does
    fleet_size      how long a request is                       fleet_transport  what both transports share
    fleet_affinity  the hashes, and who has read what           fleet_async      AsyncFleetTransport
    fleet_leases    leases, POST /route, those fetched ahead    fleet_threads    FleetTransport
    fleet_call      what is passed on, and what is for us       fleet_wire       HTTP/1.1 for it
    fleet_course    one request: where next, and when to stop
"""

from fleet_async import Answer, AsyncFleetTransport
from fleet_call import Call, Timeouts
from fleet_course import Reply
from fleet_leases import Lease
from fleet_size import Size
from fleet_threads import FleetTransport

__all__ = ["Answer", "AsyncFleetTransport", "Call", "FleetTransport", "Lease", "Reply", "Size", "Timeouts"]
