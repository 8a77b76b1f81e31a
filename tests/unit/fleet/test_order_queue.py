"""Which order is sent first."""

from fleet.commands import Create, Destroy, Drain, LookForOffers, Stop
from fleet.outside.order_queue import OrderQueue
from tests.fleet_world import make_offer


def test_stops_are_sent_before_creates() -> None:
    """A create waits for the one before; what costs money or serves must not wait behind it."""
    orders = OrderQueue()
    create = Create(make_offer(1), "more", "fleet/a")
    for command in (create, LookForOffers("more"), Destroy("fleet/b", 2, ""), Stop("fleet/c", 3, "")):
        orders.put(command)
    orders.put(Drain("fleet/d", 4, "nothing is asked of the cloud"))
    orders.end()
    sent = [type(taken) for taken in iter(orders.take, None)]
    assert sent == [Stop, Destroy, Create, LookForOffers]
