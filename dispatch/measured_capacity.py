"""What the reports of one instance say about its throughput and about the work it may hold.

The rate between two reports is the throughput when the instance had all the work it can hold in both; a
higher rate is believed of a less busy instance, too, when it lasts. The capacity settles where the memory is
full or the objective would be missed, whatever the mix of lengths: less while requests wait inside the
instance or get their tokens too slowly, more while it is full and neither is so.
"""

from web.messages.reports import LoadReport

RATE_WEIGHT = 0.3
"""Weight of one observed rate in the measured throughput: settles in about five reports."""

RATE_INTERVAL_S = (0.5, 30.0)
"""Bounds of the seconds of a rate: shorter ones see single steps, longer ones mix idle and busy."""

RATE_UP_S = 10.0
"""Seconds after which a rate above the throughput is believed of an instance that is not full."""

RATE_RANGE = 8.0
"""Most ratio between measured and told throughput, either way: a wrong counter must not take one out."""

SATURATED = 0.9
"""Share of its capacity from which on an instance counts as saturated, so that its rate is its throughput."""

CAPACITY_STEPS = (0.9, 1.05)
"""Factors of the capacity by one report: the first when requests wait inside the instance or its tokens come
too slowly, the second when it was full and neither was so. Down faster than up."""

CAPACITY_RANGE = 6.0
"""Most ratio between learned and told capacity, either way: what is told is for a usual mix of lengths, and
memory holds what it holds."""

WAITING_SHARE = 0.1
"""Overloaded when more than this share of the requests, and at least 2, wait inside in two reports in a row:
a few wait for a moment whenever prompts come together."""

SLOW_SHARE = 0.8
"""Share of the objective's time between tokens that counts as too slow already, because answers grow and
prompts come between."""


class CapacityMeter:
    """Measures the throughput and capacity of one instance, by comparing counters of two of its reports."""

    def __init__(self) -> None:
        """Start without a report to compare with."""
        # (time, work, tokens made) that the next rate is taken from
        self._base: tuple[float, float, int] | None = None
        self._was_saturated = False
        self._was_crowded = False

    def reset(self) -> None:
        """Forget the last report: the instance has rebooted, so its counters start again from zero."""
        self._base = None

    def observe(
        self,
        load: LoadReport,
        done_work: float,
        seen_work: float,
        throughput: float,
        capacity: float,
        output_token_s: float,
        now: float,
        *,
        reading: bool,
    ) -> tuple[float | None, float]:
        """Compare a load report with an earlier one; return (rate, factor).

        rate: work a second to learn the throughput from, or None. factor: what to multiply the capacity by.
        done_work: the work done, by the report's counters. seen_work: how much of the work that was given to
        the instance has come there. reading: it may still be reading prompts that it was given lately.
        output_token_s: the objective, seconds between tokens.
        """
        if not load.model_up:
            self._base = None
            return None, 1.0
        saturated = load.waiting > 0 or seen_work >= SATURATED * capacity
        learned: float | None = None
        factor = 1.0
        if self._base is not None:
            at, before, made_before = self._base
            seconds, grown = now - at, done_work >= before
            full = saturated and self._was_saturated
            if grown and seconds < RATE_INTERVAL_S[0]:
                return None, 1.0
            if grown and seconds < RATE_UP_S and saturated == self._was_saturated and not full:
                return None, 1.0
            if grown and seconds <= RATE_INTERVAL_S[1]:
                rate = (done_work - before) / seconds
                tokens_s = (load.generation_tokens_total - made_before) / seconds
                factor = self._capacity_factor(load, saturated, tokens_s, output_token_s, reading)
                if full or (rate > throughput and seconds >= RATE_UP_S):
                    learned = rate
        self._base = now, done_work, load.generation_tokens_total
        self._was_saturated = saturated
        return learned, factor

    def _capacity_factor(
        self, load: LoadReport, saturated: bool, tokens_s: float, output_token_s: float, reading: bool
    ) -> float:
        # Prompts that it was given a moment ago wait to be read: that is no lack of memory.
        crowded = load.waiting >= max(2.0, WAITING_SHARE * (load.running + load.waiting)) and not reading
        # Without tokens all of the time went into prompts, which says nothing of how far tokens are apart.
        slow = load.running > 1 and 0.0 < tokens_s * SLOW_SHARE * output_token_s < load.running
        was_crowded, self._was_crowded = self._was_crowded, crowded
        if (crowded and was_crowded) or (slow and saturated):
            return CAPACITY_STEPS[0]
        if saturated and self._was_saturated and not crowded:
            return CAPACITY_STEPS[1]
        return 1.0
