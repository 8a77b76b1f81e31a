"""What is true after every call of the loadbalancer, whatever happens. Time is a number; there is no I/O."""

import random
from collections import Counter

import pytest

from dispatch.instance import FLOOR
from dispatch.lease import Lease
from dispatch.request_queue import LOW
from dispatch.route_request import Granted
from tests.dispatch_world import DispatchWorld, instance, world
from tests.messages import load_report, request_end


def check_books(b: DispatchWorld) -> None:
    """What is true after every call."""
    balancer, queue = b.balancer, b.balancer.queue
    seen: set[str] = set()
    for inst in balancer.instances:
        awake = [x for x in inst.leases.values() if not x.rests]
        assert inst.leased_work == pytest.approx(sum(x.work for x in awake), abs=1e-6)
        assert not seen & inst.leases.keys()
        seen |= inst.leases.keys()
        assert sorted(inst.load.ids) == sorted([*(x.request_id for x in awake), *inst.other_requests])
        total = inst.leased_work + inst.other_work
        assert FLOOR * total - 1e-3 <= inst.work(b.now) <= total + 1e-3
        serves = bool(inst.stock.size and inst.circuit.left) and not inst.spec.draining
        assert (inst in balancer.instances.index) is serves
    assert seen == {lease.request_id for lease in b.unfinished}
    assert len(balancer.leases) == len(seen)
    assert balancer.leases.working == sum(bool(inst.leases) for inst in balancer.instances)
    indexed = [inst for *_, inst in balancer.instances.index.first(1000, b.now)]
    assert len(indexed) == len(set(indexed)) == sum(i in balancer.instances.index for i in balancer.instances)
    in_time = [w for w in queue.in_time_lane if not w.late]
    late = [*queue.late_lane, *(w for w in queue.in_time_lane if w.overdue)]
    waiting = in_time + late
    assert len({id(w) for w in waiting}) == len(waiting)
    assert all(w.late for w in late)
    assert (queue.held, queue.late) == (len(waiting), len(late))
    assert queue.work == pytest.approx(sum(w.ask.work for w in waiting), abs=1e-6)
    assert queue.prompt_tokens == sum(w.ask.prompt_tokens for w in waiting)
    assert queue.ahead_of(LOW) == pytest.approx(sum(w.ask.work for w in in_time), abs=1e-6)
    for lane in (in_time, list(queue.late_lane)):
        assert [w.since for w in lane] == sorted(w.since for w in lane)
    oldest_s = b.now - min((w.since for w in waiting), default=b.now)
    assert balancer.usage(b.now).traffic.oldest_wait_s == pytest.approx(oldest_s)
    if queue.late_bound_s is None:
        assert not late


@pytest.mark.parametrize("late_bound_s", [None, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_books_balance_whatever_happens(seed: int, late_bound_s: float | None) -> None:
    """Random life of a small fleet: no token twice, no work lost, capacity kept but for the idle rule."""
    rng = random.Random(seed)
    speed = {i: rng.choice([50.0, 100.0, 105.0, 400.0]) for i in range(1, 9)}
    b = world(
        *(instance(i, speed[i]) for i in range(1, 5)),
        seed=seed,
        lease_s=20.0,
        max_held=10,
        late_bound_s=late_bound_s,
    )
    out: dict[str, Lease] = {}
    ever: set[tuple[int, str]] = set()
    returned: set[str] = set()
    boots: Counter[int] = Counter()

    def given(lease: Lease) -> None:
        inst = b.balancer.instances.by_id[lease.instance_id]
        awake = [x for x in inst.leases.values() if not x.rests]
        assert inst.work(b.now) <= inst.capacity + 1e-3 or awake == [lease]
        assert (lease.instance_id, lease.token) not in ever or lease.token in returned
        ever.add((lease.instance_id, lease.token))
        returned.discard(lease.token)
        out[lease.request_id] = lease

    for _ in range(5000):
        b.now += rng.expovariate(5.0)
        step = rng.random()
        if step < 0.5:
            avoid = tuple(rng.sample(range(1, 9), rng.choice([0, 0, 0, 1, 3])))
            prompt_tokens = rng.choice([0, 0, 100, 3000])
            work = prompt_tokens * 0.1 + rng.choice([1.0, 30.0, 120.0, 900.0])
            wait_s = rng.choice([0.0, rng.uniform(0.1, 10.0)])
            max_tokens = rng.choice([None, 10, 200])
            outcome = b.request(work, wait_s, max_tokens=max_tokens, avoid=avoid, prompt_tokens=prompt_tokens)
            if isinstance(outcome, Granted):
                given(*outcome.leases)
        elif step < 0.7 and out:
            lease = out.pop(rng.choice(sorted(out)))
            how = rng.choice(["finished", "finished", "failed", "unused"])
            started = lease.started
            known = b.balancer.instances.by_id.get(lease.instance_id)
            boot = known.boot_id if known is not None else None
            if b.end(lease, how) and how == "unused" and not started:
                assert boot == lease.boot_id
                returned.add(lease.token)
        elif step < 0.9:
            for poll in b.balancer.polls(b.now):
                if rng.random() < 0.15:
                    b.balancer.complete_poll(poll, None, b.now)
                    continue
                mine = [x for x in out.values() if x.instance_id == poll.instance_id]
                ended = [x for x in mine if rng.random() < 0.4]
                if rng.random() < 0.02:
                    boots[poll.instance_id] += 1
                    b.boots[poll.instance_id] = f"boot{1 + boots[poll.instance_id]}"
                report = load_report(
                    boot_id=b.boots.get(poll.instance_id, "boot1"),
                    started=tuple(x.request_id for x in mine if rng.random() < 0.7),
                    ended=tuple(
                        request_end(x.request_id, rng.choice(["finished", "aborted"])) for x in ended
                    ),
                    running=rng.choice([0, max(0, len(mine) - len(ended)), len(mine) + 2]),
                    waiting=rng.choice([0, 0, 3]),
                    model_up=rng.random() < 0.95,
                    generation_tokens_total=rng.randrange(10_000_000),
                )
                b.balancer.complete_poll(poll, report, b.now)
        elif step < 0.94:
            chosen = rng.sample(range(1, 9), rng.randrange(0, 6))
            members = tuple(instance(i, speed[i], draining=rng.random() < 0.3) for i in sorted(chosen))
            b.hot_without_tokens(*members)
        elif step < 0.97:
            for refill in b.balancer.refills(b.now):
                b.fail_refill(refill)
        else:
            b.balancer.tick(b.now)
        if rng.random() < 0.7:
            b.refill()
        for queued, lease in b.grant():
            assert queued.over
            given(lease)
        out = {k: x for k, x in out.items() if not x.over}
        check_books(b)
    assert b.balancer.leases.given > 1000
    assert b.balancer.usage(b.now).traffic.turned_late > 0
    assert late_bound_s is not None or b.balancer.queue.late == 0
