"""What must be true after every run in virtual time.

- every request that arrived has ended, once, and was never in two places;
- each token that a model server made belongs to a request that it was given;
- the dollars in the ledger are those that the cloud charged, but for what passed between two listings.
"""

from typing import Any

from fleet.outside.ledger import Ledger
from simulation.virtual.cloud import SimulatedCloud
from simulation.virtual.instances import SimulatedInstances
from simulation.virtual.setting import CALL_S
from simulation.virtual.user_request import must
from simulation.virtual.users import Users


def audit(
    users: Users,
    instances: SimulatedInstances,
    cloud: SimulatedCloud,
    ledger: Ledger,
    turn_s: float,
    now: float,
) -> dict[str, Any]:
    """Check a finished run; return its totals, or raise NotConserved when they contradict each other."""
    arrived, ended = users.arrived, users.ended
    must(arrived == ended, f"{arrived} requests arrived, {ended} ended")
    must(users.idle, "the trace is over, and a request is still somewhere")
    made, delivered, lost = instances.tokens_made(), users.tokens_delivered, instances.tokens_lost
    must(
        delivered <= made <= delivered + lost,
        f"{made} tokens were made, {delivered} delivered, at most {lost} lost with machines",
    )
    cloud.advance(now)
    charged, booked = cloud.spent_usd(), ledger.costs(0.0, now).total
    # What passes between two listings is booked up to two turns late, each at no more than the dearest.
    changes = 2 + len(ledger.durations(0.0, now + 1.0)) + instances.ended
    allowed = changes * (3.0 * turn_s + CALL_S) * cloud.dearest_usd_h / 3600.0
    # A download is booked whole when its machine is listed, and charged as it comes.
    allowed += cloud.unfinished_download_usd()
    must(
        abs(charged - booked) <= allowed + 1e-9,
        f"the ledger has ${booked:.4f}, the cloud charged ${charged:.4f}: at most ${allowed:.4f} apart",
    )
    return {
        "requests": arrived,
        "tokens_made": made,
        "tokens_delivered": delivered,
        "usd_charged": charged,
        "usd_in_ledger": booked,
    }
