"""Who has read a prefix lately, and how much of a prompt he need not read."""

from dispatch.affinity import HOLDERS, TRUST, Prefixes
from dispatch.types import AFFINITY_BLOCK_TOKENS


def chain(*names: str) -> tuple[str, ...]:
    """Hashes of the prefixes of these blocks."""
    return tuple("/".join(names[: n + 1]) for n in range(len(names)))


def test_of_a_prompt_the_longest_prefix_that_an_instance_served_need_not_be_read() -> None:
    known = Prefixes()
    known.served(chain("system", "one", "two"), 7)
    assert known.cached_tokens(chain("system", "one", "two", "three"), 7) == TRUST * 3 * AFFINITY_BLOCK_TOKENS
    assert known.cached_tokens(chain("system", "other"), 7) == TRUST * AFFINITY_BLOCK_TOKENS
    assert known.cached_tokens(chain("system"), 8) == 0.0
    assert known.cached_tokens((), 7) == 0.0


def test_the_holders_of_the_longest_prefix_are_told_the_last_first() -> None:
    known = Prefixes()
    known.served(chain("system", "one"), 1)
    known.served(chain("system", "two"), 2)
    assert known.holders(chain("system", "one", "more")) == (1,)
    assert known.holders(chain("system", "new")) == (2, 1)
    assert known.holders(chain("strange")) == ()
    for n in range(10):
        known.served(chain("system"), n)
    assert known.holders(chain("system")) == tuple(range(9, 9 - HOLDERS, -1))


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    known = Prefixes(most=100)
    for n in range(1000):
        known.served(chain(f"session {n}", "turn"), n % 5)
    assert len(known) == 100
    assert known.holders(chain("session 0", "turn")) == ()
    assert known.holders(chain("session 999", "turn")) == (999 % 5,)


def test_an_instance_that_rebooted_has_served_nothing() -> None:
    known = Prefixes()
    known.served(chain("a", "b"), 1)
    known.served(chain("a", "c"), 2)
    known.forget(1)
    assert known.holders(chain("a", "b")) == (2,)
    assert known.cached_tokens(chain("a", "b"), 1) == 0.0
