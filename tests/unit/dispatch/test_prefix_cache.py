"""Which instance has read a prefix lately, and how much of a prompt it need not read."""

from dispatch.prefix_cache import AFFINITY_BLOCK_TOKENS, HOLDERS, TRUST, PrefixCache
from engine.forward import UNREAD
from engine.step_time_constants import TIMINGS
from tests.dispatch_world import instance, world
from tests.messages import request_end


def chain(*names: str) -> tuple[str, ...]:
    """Hashes of the prefixes of these blocks."""
    return tuple("/".join(names[: n + 1]) for n in range(len(names)))


def test_of_a_prompt_the_longest_prefix_that_an_instance_served_need_not_be_read() -> None:
    known: PrefixCache[int] = PrefixCache()
    known.served(chain("system", "one", "two"), 7)
    assert known.cached_tokens(chain("system", "one", "two", "three"), 7) == TRUST * 3 * AFFINITY_BLOCK_TOKENS
    assert known.cached_tokens(chain("system", "other"), 7) == TRUST * AFFINITY_BLOCK_TOKENS
    assert known.cached_tokens(chain("system"), 8) == 0.0
    assert known.cached_tokens((), 7) == 0.0


def test_the_holders_of_the_longest_prefix_are_told_the_last_first() -> None:
    known: PrefixCache[int] = PrefixCache()
    known.served(chain("system", "one"), 1)
    known.served(chain("system", "two"), 2)
    assert known.holders(chain("system", "one", "more")) == (1,)
    assert known.holders(chain("system", "new")) == (2, 1)
    assert known.holders(chain("strange")) == ()
    for n in range(10):
        known.served(chain("system"), n)
    assert known.holders(chain("system")) == tuple(range(9, 9 - HOLDERS, -1))


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    known: PrefixCache[int] = PrefixCache(most=100)
    for n in range(1000):
        known.served(chain(f"session {n}", "turn"), n % 5)
    assert len(known) == 100
    assert known.holders(chain("session 0", "turn")) == ()
    assert known.holders(chain("session 999", "turn")) == (999 % 5,)


def test_a_request_goes_where_its_prefix_was_read_unless_it_would_wait_for_longer_there() -> None:
    told = TIMINGS["13B", "awq4", "A100 SXM4", 1]
    b = world(*(instance(n, timing=told) for n in (1, 2, 3)))
    prefix = chain("a", "b", "c", "d", "e", "f", "g", "h")
    first = b.lease(500.0, prompt_tokens=2100, affinity=prefix)
    b.report(first.instance_id, started=(first.request_id,), ended=(request_end(first.request_id),), seq=2)
    for n in range(5):
        again = b.lease(500.0, prompt_tokens=2100, affinity=prefix)
        assert again.instance_id == first.instance_id
        b.report(
            again.instance_id, started=(again.request_id,), ended=(request_end(again.request_id),), seq=3 + n
        )
    b.lease(1000.0, prompt_tokens=8000, avoid=tuple({1, 2, 3} - {first.instance_id}))
    crowded = b.lease(500.0, prompt_tokens=2100, affinity=prefix)
    assert crowded.instance_id != first.instance_id, "8,000 tokens are to be read there before it"


def test_an_instance_that_rebooted_has_served_nothing() -> None:
    told = TIMINGS["13B", "awq4", "A100 SXM4", 1]
    b = world(*(instance(n, timing=told) for n in range(1, 9)))
    prefix = chain("a", "b", "c", "d")
    for n in range(3):
        lease = b.lease(500.0, prompt_tokens=1100, affinity=prefix)
        b.report(
            lease.instance_id, started=(lease.request_id,), ended=(request_end(lease.request_id),), seq=2 + n
        )
    others = tuple({*range(1, 9)} - {lease.instance_id})
    again = b.lease(500.0, prompt_tokens=1100, affinity=prefix, avoid=others)
    assert again.row[UNREAD] == 1100 - TRUST * 4 * AFFINITY_BLOCK_TOKENS
    b.boots[lease.instance_id] = "another"
    b.report(lease.instance_id, boot_id="another", seq=0)
    b.refill()
    again = b.lease(500.0, prompt_tokens=1100, affinity=prefix, avoid=others)
    assert again.row[UNREAD] == 1100


def test_a_batch_is_remembered_by_the_memory_that_reads_it() -> None:
    """Not by the instance's own number, which another memory may have."""
    told = TIMINGS["13B", "awq4", "A100 SXM4", 1]
    b = world(*(instance(n, timing=told) for n in (1, 2, 3)))
    prefix = chain("a", "b", "c", "d")
    leases = b.batch(500.0, 2, prompt_tokens=1100, affinity=prefix)
    served = {lease.instance_id for lease in leases}
    for n in (1, 2, 3):
        again = b.lease(500.0, prompt_tokens=1100, affinity=prefix, avoid=tuple({1, 2, 3} - {n}))
        assert bool(again.row[UNREAD] < 1100) is (n in served)
