"""Which instances say values that agree with what most others say, so that one that lies teaches nothing.

What is learned of all requests (lengths of answers and prompts) comes from what instances say of single ones.
Each value is compared with what is expected, as the logarithm of their ratio. An instance whose mean is far
from those of more than half of the others is not believed, nor is one of which too little is known. Its last
WAITING values always wait: so those with which it begins to lie are dropped, not learned. With fewer than
three instances there is no majority, and each is believed within its range.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

MAJORITY = 3
"""Instances with which there is a majority."""

LEAST, MEMORY, WAITING = 4, 16, 10
"""Values after which an instance is compared, that make up its mean, and that wait to be learned."""

FAR, SPREAD = 0.7, 1.5
"""Logarithm of a ratio (2) that is far; and what is added for each of two instances, over the square root of
its values: single answers of one kind differ by a factor of 3 or so."""

MOST = 4.0
"""A value counts at most so much: 55 times what is expected, or a 55th."""

MOST_OTHERS, MOST_KEPT = 16, 2048
"""Others that an instance is compared with, those heard of last, and instances that are remembered."""


@dataclass(slots=True)
class Said(Generic[T]):
    """What one instance has said: so many values, their mean, and what waits to be learned."""

    values: int = 0
    mean: float = 0.0
    waiting: deque[T] = field(default_factory=deque)

    def add(self, value: float, what: T) -> None:
        """Take in a value. what: to be learned with it."""
        self.values += 1
        self.mean += (max(-MOST, min(MOST, value)) - self.mean) / min(self.values, MEMORY)
        self.waiting.append(what)

    def take(self, keep: int) -> list[T]:
        """Take what waits, oldest first, but for so many that came last."""
        return [self.waiting.popleft() for _ in range(len(self.waiting) - keep)]

    def is_far_from(self, other: "Said[T]") -> bool:
        """Return whether two instances do not say the same, for all that is known of each."""
        room = FAR + SPREAD / math.sqrt(self.values) + SPREAD / math.sqrt(other.values)
        return abs(self.mean - other.mean) > room


class Agreement(Generic[T]):
    """What each instance has said of one thing, and which of them are believed."""

    def __init__(self) -> None:
        """Start before any instance has said anything."""
        self._said: dict[int, Said[T]] = {}  # the latest last

    def note(self, instance_id: int, value: float, what: T, hot: int) -> list[T]:
        """Take in a value; return what may be learned now.

        value: logarithm of the ratio to what was expected. what: to be learned if the instance is believed.
        hot: instances that serve.
        """
        said = self._said.pop(instance_id, None) or Said[T]()
        self._said[instance_id] = said
        if len(self._said) > MOST_KEPT:
            del self._said[next(iter(self._said))]
        said.add(value, what)
        if hot < MAJORITY:
            return said.take(0)
        believed = self.believes(instance_id)
        if believed is False:
            said.waiting.clear()
        elif believed or len(said.waiting) > 4 * WAITING:  # else: there is nobody to compare with
            return said.take(WAITING)
        return []

    def believes(self, instance_id: int) -> bool | None:
        """Return whether an instance is believed, by what it has said so far; None: not known yet."""
        said = self._said.get(instance_id)
        if said is None or said.values < LEAST:
            return None
        others: list[Said[T]] = []
        for one in reversed(self._said.values()):
            if one is not said and one.values >= LEAST:
                others.append(one)
                if len(others) == MOST_OTHERS:
                    break
        if len(others) < MAJORITY - 1:
            return None
        return 2 * sum(said.is_far_from(one) for one in others) <= len(others)
