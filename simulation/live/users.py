"""Users' requests: sent when they are due whatever happens, tried again elsewhere, recorded.

    due ─► fleet_client: lease, instance, answer streamed back ─► completed
             ▲    │ no lease: pause        │ refused, broke off, no end
             └────┘                        └─► again from the start, elsewhere

Latencies count from the moment a request was due, which nothing that happens in the run changes (open loop).
A request fails only when its time is up or when an answer says that it can never succeed.
"""

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2

from fleet_client import AsyncAnswer, AsyncFleetTransport, Call, ClientLease, Timeouts, TokenEstimate
from fleet_client.back_off import back_off_s
from instance_client import BrokenOff, read_answer, read_stream
from process.errors import InstanceError
from simulation.figures import Digest
from simulation.live.workload import Arrival, Workload, body_of
from simulation.report import COMPLETED, Record

MOST_AVOIDED = 16
"""Instances that a request avoids at once, the last that failed it; the loadbalancer refuses more than 64."""

PAUSE_S = (0.1, 2.0)
"""Seconds of pause after a refusal or a second setback: the first, doubling up to the second; or a longer
Retry-After."""

LAST_TRY_S = 0.5
"""Seconds that must be left for another try to get a lease: in less, no answer could come."""

CONNECT_S = 5.0
"""Seconds for a connection: packets cross an ocean in 0.2 s, and a lost SYN is repeated after 1 and 3 s."""

STALL_S = 30.0
"""Seconds of silence after which a streamed answer is given up: instances get no more than hold_s of work."""

NOT_STARTED = frozenset(("no_connection", "no_tls", "wrong_certificate", "bad_address"))
"""Failures of the transport after which the engine cannot have seen the prompt."""


@dataclass(frozen=True)
class TryResult:
    """What became of one try to serve a request, with at most one lease and one instance.

    failure: its kind, None when the request was served. instance_id: the instance that failed it, None when
    none was asked; then retry_after_s says when to ask again. final: another try cannot help. cut_short: the
    request's time was over before anything came.
    """

    failure: str | None
    instance_id: int | None = None
    final: bool = False
    retry_after_s: float = 0.0
    cut_short: bool = False


def _setback(call: Call, failure: str) -> TryResult:
    return TryResult(failure, call.setbacks[-1][0])


def _no_lease(call: Call, answer: AsyncAnswer) -> TryResult:
    if answer.status < 500 and answer.status != 429:  # 429: so many leases unused, later there are more
        return TryResult("refused_by_loadbalancer", final=True)
    code = call.refusals[-1] if call.refusals else ""
    silent = code.startswith("http_") or code in ("unreachable", "bad_answer")
    retry_after = next((v for name, v in answer.headers if name.lower() == b"retry-after"), b"0")
    return TryResult(
        "loadbalancer_unreachable" if silent else "no_capacity", retry_after_s=float(retry_after)
    )


class Driver:
    """Sends the planned requests when they are due and keeps a record of each.

    first_tokens: seconds to the first token of the latest answers, for the live display only. between_tokens:
    seconds between two events of the streams that came to their end.
    """

    def __init__(self, load: Workload, transport: AsyncFleetTransport) -> None:
        """Make a driver that sends nothing before run().

        transport: makes one try for each call; further tries are made here.
        """
        self.records: list[Record] = []
        self.in_flight = 0
        self.outcomes: Counter[str] = Counter()
        self.first_tokens: deque[float] = deque(maxlen=1000)
        self.between_tokens = Digest()
        self.seen_addresses: set[str] = set()
        self.begun = 0.0
        self._load = load
        self._transport = transport
        self._jitter = random.Random(load.seed)
        self._clock = time.perf_counter

    async def run(self, arrivals: Sequence[Arrival]) -> None:
        """Send all requests and wait for all answers.

        When cancelled, requests in flight end as interrupted.
        """
        self.begun = self._clock()
        async with asyncio.TaskGroup() as group:
            for arrival in arrivals:
                due = self.begun + arrival.at_s
                # At least once, so that sending late ones cannot starve those that are under way.
                await asyncio.sleep(max(0.0, due - self._clock()))
                while (left_s := due - self._clock()) > 0.0:
                    await asyncio.sleep(left_s)
                group.create_task(self._request(arrival))

    async def _request(self, arrival: Arrival) -> None:
        due = self.begun + arrival.at_s
        record = Record(due_s=arrival.at_s, lag_s=self._clock() - due)
        self.records.append(record)
        self.in_flight += 1
        try:
            record.outcome = await self._until_served(arrival, record, due)
        except asyncio.CancelledError:
            record.outcome = "interrupted"
            raise
        finally:
            if record.outcome != COMPLETED:
                record.end_s = self._clock() - due
            self.in_flight -= 1
            self.outcomes[record.outcome] += 1

    async def _until_served(self, arrival: Arrival, record: Record, due: float) -> str:
        """Try until the request is served or its time is over; return "completed" or the kind of failure."""
        up_at = due + self._load.request_timeout_s
        body = body_of(arrival, self._load.model, self._load.streaming, self._load.seed)
        raw = json.dumps(body).encode()
        avoid: list[int] = []
        last: str | None = None  # how an instance failed it
        setbacks = refusals = 0  # of instances, of the loadbalancer
        while True:
            call = self._call(arrival, raw, avoid, up_at)
            tried = await self._try(call, record, due, up_at)
            record.add_call(call.asked_s, call.leases, call.refusals)
            if tried.failure is None:
                return COMPLETED
            if tried.cut_short and last is not None:
                return last  # the time was up in a try that had come to nothing yet
            if tried.instance_id is not None:
                last = tried.failure
                # The first retry goes at once, elsewhere.
                pause_s = back_off_s(setbacks, *PAUSE_S) * self._jitter.uniform(0.75, 1.0)
                setbacks += 1
                record.add_setback(tried.failure)
                if tried.final or self._clock() + pause_s >= up_at:
                    return tried.failure
                avoid = [*avoid, tried.instance_id][-MOST_AVOIDED:]
                await asyncio.sleep(pause_s)
                continue
            left_s = up_at - self._clock()
            if tried.final or left_s < LAST_TRY_S:
                return tried.failure
            avoid = []
            # When a Retry-After is longer than the time that is left, room may still come sooner.
            refusals += 1
            rest_s = max(tried.retry_after_s, back_off_s(refusals, *PAUSE_S))
            nap_s = min(rest_s * self._jitter.uniform(1.0, 1.25), left_s / 2)
            await asyncio.sleep(nap_s)
            record.add_pause(nap_s)

    def _call(self, arrival: Arrival, raw: bytes, avoid: list[int], up_at: float) -> Call:
        left_s = max(0.0, up_at - self._clock())
        return Call(
            "POST",
            "/v1/completions",
            ((b"Content-Type", b"application/json"),),
            raw,
            TokenEstimate(arrival.prompt_tokens, arrival.max_tokens),
            Timeouts(
                connect=CONNECT_S,
                read=STALL_S if self._load.streaming else None,
                pool=min(self._load.wait_s, left_s),
            ),
            avoid=avoid,
        )

    async def _try(self, call: Call, record: Record, due: float, up_at: float) -> TryResult:
        """Try to serve a request once: get one lease and ask one instance, at most."""
        answer: AsyncAnswer | None = None
        try:
            async with asyncio.timeout(max(0.0, up_at - self._clock())):
                answer = await self._transport.exchange(call)
                if answer.lease is None:
                    return _no_lease(call, answer) if not call.setbacks else _setback(call, "not_started")
                self.seen_addresses.add(answer.lease.address)
                if call.setbacks:  # 429 or 503
                    return _setback(call, "not_started")
                return await self._read(call, answer, answer.lease, record, due)
        except TimeoutError:
            if answer is None:
                return TryResult("timeout" if call.leases else "no_capacity", final=True, cut_short=True)
            answer.fail("timeout")
            return TryResult(
                "timeout", None if answer.lease is None else answer.lease.instance_id, final=True
            )
        except httpx2.RequestError:
            if not call.setbacks:
                return TryResult("loadbalancer_unreachable")
            unsent = call.setbacks[-1][1] in NOT_STARTED
            return _setback(call, "not_started" if unsent else "broken_off")
        finally:
            if answer is not None:
                await answer.aclose()

    async def _read(
        self, call: Call, answer: AsyncAnswer, lease: ClientLease, record: Record, due: float
    ) -> TryResult:
        """Read the answer to its end, note it in the request's record, and return how the try ended."""
        if 400 <= answer.status < 500:
            return TryResult("rejected", lease.instance_id, final=True)
        failure = "broken_off"
        gaps_s: list[float] = []
        try:
            if answer.status == 200 and self._load.streaming:
                done = await read_stream(lease.address, aiter(answer), gaps_s)
            elif answer.status == 200:
                done = read_answer(lease.address, b"".join([chunk async for chunk in answer]))
            else:
                done = None
        except BrokenOff:
            done = None
        except InstanceError:
            done, failure = None, "bad_answer"
        if done is not None and done.error is None and done.completion_tokens < 1:
            failure = "bad_answer"
        if done is None or done.error is not None or done.completion_tokens < 1:
            # The loadbalancer is told the kind only: an error's own words may quote prompt and answer.
            answer.fail(failure)
            return _setback(call, failure)
        first_s = done.first_token_s - due if self._load.streaming else None
        self.between_tokens.extend(gaps_s)
        record.complete(done.prompt_tokens, done.completion_tokens, first_s, done.end_s - due)
        if first_s is not None:
            self.first_tokens.append(first_s)
        return TryResult(None, lease.instance_id)
