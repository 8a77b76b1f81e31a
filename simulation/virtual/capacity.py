"""Measure what one instance can do with the request lengths of a log, on a simulated model server kept full.

A model server is given requests of the log while none waits inside it and its tokens come in time, which is
where the loadbalancer's own measure of capacity settles (dispatch/measured_capacity.py).
"""

from collections.abc import Iterable
from itertools import cycle, islice

from dispatch.measured_capacity import SLOW_SHARE
from engine.profile import Profile
from engine.reference import EventKind, SteppedModelServer
from engine.slo import Slo
from engine.step_time_constants import Timing
from policies.types import Capacity
from simulation.traces.request import Request

REQUESTS = 1500
"""Number of requests that are served; the first third fills the server and does not count."""


def capacity_of(profile: Profile, timing: Timing, requests: Iterable[Request], slo: Slo) -> Capacity:
    """Return the capacity of an instance with this model and timing for requests as long as these.

    Raises ValueError when there are none.
    """
    sample = list(islice(requests, 20_000))
    if not sample:
        raise ValueError("no request to measure with")
    lengths = [_cut(r, timing.kv_tokens) for r in sample]
    server = SteppedModelServer(timing, every_token=False)
    work: dict[str, float] = {}
    done = at_once = last = now = begun = 0.0
    ended = counted = 0
    for given, (prompt, output) in enumerate(cycle(lengths)):
        while server.waiting > 1 or _too_slow(server, timing, slo):
            now = server.next_change() or now
            if ended >= REQUESTS // 3:
                at_once += (now - last) * (given - ended)
            last = now
            for event in server.advance(now):
                if event.kind is EventKind.FINISHED:
                    ended += 1
                    finished = work.pop(event.id)
                    if ended > REQUESTS // 3:
                        done += finished
                        counted += 1
                    else:
                        begun = now
        if ended >= REQUESTS:
            break
        work[str(given)] = profile.prefill_weight * prompt + output
        server.submit(str(given), prompt, output, now)
    seconds = max(now - begun, 1e-9)
    return Capacity(done / seconds, counted / seconds, at_once / seconds, float(timing.kv_tokens))


def _cut(request: Request, longest: int) -> tuple[int, int]:
    output = min(request.output_tokens, longest // 2)
    return min(request.prompt_tokens, longest - output), output


def _too_slow(server: SteppedModelServer, timing: Timing, slo: Slo) -> bool:
    """Return whether the server's tokens would come too far apart if it ran one request more."""
    step_s = timing.step_ms(server.running + 1, server.kv_tokens_used) / 1e3
    return server.running > 0 and step_s > SLOW_SHARE * slo.output_token_s
