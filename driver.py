"""Users' requests: drawn ahead, sent when they are due whatever happens, tried again elsewhere, recorded.

    due ─► POST /route (waits there) ─► lease ─► instance: prompt, answer streamed back ─► completed
             ▲    │ 503, unreachable: pause                 │ refused, broke off, no end
             └────┘                                         └─► again from the start, elsewhere

All of a run is drawn from the seed before the first request is sent, and nothing that happens later changes
it (open loop): a slow answer never delays the next arrival, and latencies count from the moment a request
was due. A request fails only when its time is up or somebody says that it can never succeed.
Prompts are token ids, so that every engine counts the same number, and `ignore_eos` makes answers as long as
was drawn.
"""

import asyncio
import contextlib
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp

from errors import InstanceError
from instance_client import BrokenOff, InstanceClient, NotStarted
from profiles import get_profile
from report import COMPLETED, Record

LENGTH_SIGMA = (0.81, 0.68)
"""Of the log-normal lengths of prompts and answers: the spread (standard deviation over mean, 0.96 and 0.77)
of the Azure conversation log of 2023-11."""

TOKEN_IDS = (3, 256)
"""First id and number of ids prompts are made of: all vocabularies have these; 0 to 2 are often special."""

AVOID_WAIT_S = 3.0
"""How long /route may hold a request that avoids an instance; then it takes any, rather than none."""

MOST_AVOIDED = 16
"""Instances that a request avoids at once, the last that failed it; the loadbalancer refuses more than 64."""

PAUSE_S = (0.1, 2.0)
"""After a refusal or a second setback: the first, doubling up to the second; or a longer Retry-After."""

LAST_TRY_S = 0.5
"""With less time left than this no lease is asked for again: nothing could be answered in it."""

ROUTE_SLACK_S = 5.0
"""What POST /route may take beyond the wait that was asked for."""

CONNECT_S = 5.0
"""For a connection: packets cross an ocean in 0.2 s, and a lost SYN is repeated after 1 and 3 s."""

STALL_S = 30.0
"""A streamed answer silent for so long has died: instances are not given more than hold_s of work."""

ENDS_KEPT, ENDS_AT_ONCE, ENDS_LAST_S = 10_000, 8, 3.0
"""Ends of leases that wait to be told, those told at once, and what the last may take after the run."""


@dataclass(frozen=True)
class Workload:
    """What users send, and how long they wait for it. Times in seconds, lengths in tokens."""

    num_iterations: int = 60  # rounds
    round_s: float = 1.0
    base_num_users: int = 20
    request_probability: float = 0.1  # 20 users: 2 requests/s, half of what one RTX 4090 can do with vllm-13
    load_schedule: tuple[float, ...] = (1.0,)
    streaming: bool = True
    model: str = "vllm-13"
    prompt_tokens: float = 300.0  # mean
    max_tokens: float = 180.0  # mean
    seed: int = 0
    wait_s: float = 30.0  # POST /route holds a request so long before it says 503
    request_timeout_s: float = 120.0  # from due to the end of the answer, all tries together


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come. at_s: when it is due, seconds since the start of the run."""

    number: int
    at_s: float
    prompt_tokens: int
    max_tokens: int


def plan(load: Workload) -> list[Arrival]:
    """All requests of the run in order of time; the same workload gives the same list.

    Lengths are log-normal with the means asked for, cut so that prompt and answer fit the model's context.
    """
    rng = random.Random(load.seed)
    longest = get_profile(load.model).max_model_len
    due: list[float] = []
    for n in range(load.num_iterations):
        multiple = load.load_schedule[n * len(load.load_schedule) // load.num_iterations]
        for _ in range(round(load.base_num_users * multiple)):
            if rng.random() < load.request_probability:
                due.append((n + rng.random()) * load.round_s)  # noqa: PERF401 two draws, in this order
    arrivals = []
    for number, at_s in enumerate(sorted(due)):
        output = _length(rng, load.max_tokens, LENGTH_SIGMA[1], longest - 1)
        prompt = _length(rng, load.prompt_tokens, LENGTH_SIGMA[0], longest - output)
        arrivals.append(Arrival(number, at_s, prompt, output))
    return arrivals


def _length(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    # exp(mu + sigma²/2) is the mean of a log-normal
    return min(most, max(1, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def body_of(arrival: Arrival, model: str, streaming: bool, seed: int) -> dict[str, Any]:
    """The request to an instance. Its prompt is its own, so that no prefix cache can help."""
    first, ids = TOKEN_IDS
    raw = random.Random((seed << 32) + arrival.number).randbytes(arrival.prompt_tokens)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [first + b % ids for b in raw],
        "max_tokens": arrival.max_tokens,
        "ignore_eos": True,
        "stream": streaming,
    }
    if streaming:
        body["stream_options"] = {"include_usage": True}
    return body


# --- outside world ---------------------------------------------------------------------------------


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries the key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True)
class Lease:
    """Where one request may go. The token must not be shown."""

    address: str
    token: str
    request_id: str
    instance_id: int
    model: str
    certificate: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Why there is no lease. final: asking again cannot help. retry_after_s: not to be asked sooner."""

    kind: str
    failure: str
    retry_after_s: float = 0.0
    final: bool = False


class Loadbalancer:
    """Its routes for clients."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str | None) -> None:
        """key: of a client, where the loadbalancer wants one."""
        self._session = session
        self._url = url
        self._headers = bearer(key)

    async def route(self, arrival: Arrival, avoid: Sequence[int], wait_s: float) -> Lease | Refusal:
        """Ask for a lease, waiting there for at most wait_s; never raises for what the other side does."""
        body: dict[str, Any] = {"prompt_tokens": arrival.prompt_tokens, "max_tokens": arrival.max_tokens}
        if wait_s > 0.0:
            body["wait_s"] = wait_s
        if avoid:
            body["avoid"] = list(avoid)
        try:
            async with self._session.post(
                f"{self._url}/route",
                json=body,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=wait_s + ROUTE_SLACK_S, sock_connect=CONNECT_S),
                allow_redirects=False,
            ) as reply:
                raw = await reply.read()
                status, retry_after = reply.status, reply.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return Refusal("unreachable", "loadbalancer_unreachable")
        return read_route(status, raw, retry_after)

    async def done(self, request_id: str, outcome: str, why: str) -> int:
        """Tell how a lease ended; the HTTP status, or 0 when there was no answer."""
        body = {"request_id": request_id, "outcome": outcome} | ({"why": why} if why else {})
        try:
            async with self._session.post(
                f"{self._url}/done",
                json=body,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=5.0),
                allow_redirects=False,
            ) as reply:
                await reply.read()
                return reply.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0


def read_route(status: int, raw: bytes, retry_after: str | None) -> Lease | Refusal:
    """What an answer of POST /route says."""
    try:
        said = json.loads(raw)
        if status == 200:
            return Lease(
                str(said["address"]),
                str(said["token"]),
                str(said["request_id"]),
                int(said["instance_id"]),
                str(said["model"]),
                said.get("certificate"),
            )
        kind = str(said["error"])[:40]
    except (ValueError, KeyError, TypeError):
        kind = "bad_answer" if status == 200 else f"http_{status}"
    if status == 503:
        return Refusal(kind, "no_capacity", _seconds(retry_after))
    final = 400 <= status < 500 and status not in (408, 429)
    failure = "refused_by_loadbalancer" if final else "loadbalancer_unreachable"
    return Refusal(kind, failure, _seconds(retry_after), final)


def _seconds(retry_after: str | None) -> float:
    """A Retry-After in seconds; one that is a date, or is no number, is as none."""
    try:
        return min(600.0, max(0.0, float(retry_after or 0.0)))
    except ValueError:
        return 0.0


class LeaseEnds:
    """Tells the loadbalancer how leases ended. Nobody waits for it; it never holds more than ENDS_KEPT."""

    def __init__(self, loadbalancer: Loadbalancer) -> None:
        """Nothing is told before run()."""
        self.untold = 0
        self._waiting = 0
        self._loadbalancer = loadbalancer
        self._queue: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue(ENDS_KEPT)

    def tell(self, lease: Lease, outcome: str, why: str = "") -> None:
        """Have it told: finished, failed (why) or unused."""
        try:
            self._queue.put_nowait((lease.request_id, outcome, why))
            self._waiting += 1
        except asyncio.QueueFull:
            self.untold += 1

    async def run(self) -> NoReturn:
        """Tell what there is, ENDS_AT_ONCE at a time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(ENDS_AT_ONCE):
                group.create_task(self._tell_one_by_one())
        raise AssertionError("its tasks never end")

    async def last(self) -> None:
        """Return when all is told, or after ENDS_LAST_S; what is left then counts as untold."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDS_LAST_S):
                await self._queue.join()
        self.untold += self._waiting

    async def _tell_one_by_one(self) -> NoReturn:
        while True:
            end = await self._queue.get()
            try:
                if await self._loadbalancer.done(*end) != 200:
                    self.untold += 1
            finally:
                self._waiting -= 1
                self._queue.task_done()


class Driver:
    """Sends the planned requests when they are due and keeps a record of each."""

    def __init__(
        self, load: Workload, loadbalancer: Loadbalancer, ends: LeaseEnds, client: InstanceClient
    ) -> None:
        """Nothing is sent before run()."""
        self.records: list[Record] = []
        self.in_flight = 0
        self.outcomes: Counter[str] = Counter()
        self.first_tokens: deque[float] = deque(maxlen=1000)  # for the live figures only
        self.seen_addresses: set[str] = set()
        self.begun = 0.0
        self._load = load
        self._loadbalancer = loadbalancer
        self._ends = ends
        self._client = client
        self._jitter = random.Random(load.seed)
        self._clock = time.perf_counter

    async def run(self, arrivals: Sequence[Arrival]) -> None:
        """Send all and wait for all. When cancelled, what is in flight ends as interrupted."""
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
        """Try until it is served or its time is up; "completed" or the kind of failure."""
        up_at = due + self._load.request_timeout_s
        avoid: list[int] = []
        pause_s = 0.0  # the first retry goes at once: another instance is likely well
        while True:
            lease = await self._lease(arrival, avoid, record, up_at)
            if isinstance(lease, str):
                return lease
            setback, again = await self._try(arrival, lease, record, due, up_at)
            if setback is None:
                return COMPLETED
            record.setbacks[setback] += 1
            if not again or self._clock() + pause_s >= up_at:
                return setback
            avoid = [*avoid, lease.instance_id][-MOST_AVOIDED:]
            await asyncio.sleep(pause_s)
            pause_s = self._longer(pause_s)

    async def _lease(self, arrival: Arrival, avoid: list[int], record: Record, up_at: float) -> Lease | str:
        """A lease, or the kind of failure; empties avoid when all that are left are to be avoided."""
        asked = self._clock()
        pause_s = PAUSE_S[0]
        try:
            while True:
                left_s = up_at - self._clock()
                wait_s = min(self._load.wait_s, left_s, AVOID_WAIT_S if avoid else left_s)
                said = await self._loadbalancer.route(arrival, avoid, max(0.0, wait_s))
                if isinstance(said, Lease):
                    return said
                record.refusals[said.kind] += 1
                left_s = up_at - self._clock()
                if said.final or left_s < LAST_TRY_S:
                    return said.failure
                avoid.clear()
                rest_s = max(said.retry_after_s, pause_s) * self._jitter.uniform(1.0, 1.25)
                # When a Retry-After is longer than the time that is left, room may still come sooner.
                await asyncio.sleep(min(rest_s, left_s / 2))
                pause_s = self._longer(pause_s)
        finally:
            record.route_s += self._clock() - asked

    async def _try(
        self, arrival: Arrival, lease: Lease, record: Record, due: float, up_at: float
    ) -> tuple[str | None, bool]:
        """(None, …) when it was served, else (what went wrong, whether another try may help)."""
        record.leases += 1
        self.seen_addresses.add(lease.address)
        body = body_of(arrival, lease.model, self._load.streaming, self._load.seed)
        timeouts = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=STALL_S if self._load.streaming else None
        )
        try:
            async with asyncio.timeout(max(0.0, up_at - self._clock())):
                answer = await self._client.stream(
                    lease.address, lease.token, body, timeouts, lease.certificate
                )
        except TimeoutError:
            return self._failed(lease, "timeout"), False
        except NotStarted:
            return self._failed(lease, "not_started"), True
        except BrokenOff:
            return self._failed(lease, "broken_off"), True
        except InstanceError:
            return self._failed(lease, "bad_answer"), True
        except asyncio.CancelledError:
            self._ends.tell(lease, "finished", "client_went_away")
            raise
        if 400 <= answer.status < 500:
            self._ends.tell(lease, "finished", f"status_{answer.status}")
            return "rejected", False
        if answer.status != 200 or answer.error is not None:
            return self._failed(lease, "broken_off"), True
        if answer.completion_tokens < 1:
            return self._failed(lease, "bad_answer"), True
        self._ends.tell(lease, "finished")
        record.end_s = answer.end_s - due
        record.prompt_tokens, record.output_tokens = answer.prompt_tokens, answer.completion_tokens
        if self._load.streaming:
            record.first_token_s = answer.first_token_s - due
            self.first_tokens.append(record.first_token_s)
        return None, False

    def _failed(self, lease: Lease, kind: str) -> str:
        """The loadbalancer is told the kind only: an error's own words may quote prompt and answer."""
        self._ends.tell(lease, "failed", kind)
        return kind

    def _longer(self, pause_s: float) -> float:
        return min(max(2 * pause_s, PAUSE_S[0]), PAUSE_S[1]) * self._jitter.uniform(0.75, 1.0)
