"""Steady users of the fleet, each answer looked through token by token.

    default   the openai package as it comes (two retries), through a gateway or a transport of its own
    patient   asks again until 120 s have passed, as a program does that must have its answer

An answer of the paced engine is known beforehand: `max_tokens` pieces of one text, the reason "length" and a
count. So an answer that was cut, doubled or counted wrongly is seen, also where no error was.
"""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

from fleet_client import AsyncFleetTransport
from localcloud.paced.completion_request import PIECES

PATIENCE_S = 120.0
"""Seconds for which patient users ask again."""

TIMEOUT_S = 100.0
"""Seconds of silence after which a default user gives a try up; the package's own 600 outlast a storm."""

TRY_S = 25.0
"""The same for a patient one, who asks again."""

END_S = PATIENCE_S + 30.0
"""Seconds that the last requests have; what has not ended then is unfinished, and counts as failed."""

MODEL = "vllm-13"

OK, FAILED = "ok", "failed"
CUT, DOUBLED, MISCOUNTED = "cut", "doubled", "miscounted"
SILENT = (CUT, DOUBLED, MISCOUNTED)
"""Outcomes that a user cannot see: no error came."""


@dataclass
class Outcome:
    """What became of one request. at_s: since the campaign's begin; failure: what its user saw last."""

    user: str
    at_s: float
    what: str = ""
    took_s: float = 0.0
    first_s: float = 0.0
    tries: int = 0
    failure: str = ""

    def begin_try(self) -> None:
        """Count one call of the package."""
        self.tries += 1

    def fail(self, why: str) -> str:
        """Note what its user saw."""
        self.failure = why
        return FAILED

    def see_first(self, after_s: float) -> None:
        """Note when the first piece came."""
        self.first_s = after_s

    def end(self, what: str, took_s: float) -> None:
        """Note what became of it."""
        self.what, self.took_s = what, took_s


@dataclass
class Seen:
    """What one answer has shown so far."""

    text: list[str] = field(default_factory=list)
    reason: str | None = None
    tokens: int | None = None
    first_at: float | None = None

    def add(self, text: str | None, reason: str | None = None) -> None:
        """Take in a piece, and why it was the last."""
        self.reason = reason or self.reason
        if text:
            self.first_at = self.first_at or time.monotonic()
            self.text.append(text)

    def count(self, tokens: int | None) -> None:
        """Take in the engine's own count."""
        self.tokens = self.tokens if tokens is None else tokens

    def verdict(self, wanted: int) -> str:
        """Say whether this is the whole answer."""
        text = "".join(self.text)
        whole = text_of(wanted)
        if text != whole:
            return CUT if whole.startswith(text) else DOUBLED
        if self.reason is None:
            return CUT
        return OK if self.reason == "length" and self.tokens == wanted else MISCOUNTED


def text_of(tokens: int) -> str:
    """Return what the paced engine answers with so many tokens."""
    return b"".join(PIECES[at % len(PIECES)] for at in range(tokens)).decode()


@dataclass(frozen=True)
class UserSettings:
    """Where users ask: through gateways, and of loadbalancers by a transport of their own, with that key."""

    gateways: tuple[str, ...]
    loadbalancers: tuple[str, ...]
    key: str
    rate_s: float
    seed: int


class Users:
    """Users in a thread of their own, from `start` until `stop`."""

    def __init__(self, settings: UserSettings) -> None:
        """Ask nothing yet."""
        self.outcomes: list[Outcome] = []
        self.canary = f"canary-{settings.seed:08x}-{random.SystemRandom().getrandbits(64):016x}"
        self.begun = time.monotonic()
        self.errors: list[str] = []
        self._settings = settings
        self._rng = random.Random(settings.seed)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="users", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no more requests, and return when those under way have ended or had the time for it."""
        self._ending.set()
        self._thread.join(END_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as e:
            self.errors.append(f"{type(e).__name__}: {e}")
            raise

    def _clients(self, retries: int, timeout_s: float) -> list[openai.AsyncOpenAI]:
        s = self._settings
        timeout = httpx2.Timeout(timeout_s, connect=5.0)
        through = [
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=retries, timeout=timeout)
            for url in s.gateways
        ]
        own = [
            openai.AsyncOpenAI(
                http_client=httpx2.AsyncClient(
                    transport=AsyncFleetTransport(url, api_key=s.key), timeout=timeout
                ),
                base_url="http://fleet/v1",
                api_key="x",
                max_retries=retries,
            )
            for url in s.loadbalancers
        ]
        return through + own

    async def _all(self) -> None:
        default = self._clients(openai.DEFAULT_MAX_RETRIES, TIMEOUT_S)
        patient = self._clients(0, TRY_S)
        async with contextlib.AsyncExitStack() as stack:
            for client in default + patient:
                await stack.enter_async_context(client)
            async with asyncio.TaskGroup() as group:
                number = 0
                while not self._ending.is_set():
                    clients = patient if number % 2 else default
                    asking = self._patient(clients, number) if number % 2 else self._default(clients, number)
                    group.create_task(asking)
                    number += 1
                    await asyncio.sleep(self._rng.expovariate(self._settings.rate_s))

    def _body(self, number: int) -> dict[str, Any]:
        wanted = self._rng.choice((8, 24, 60, 120))
        words = " ".join(f"word{self._rng.randrange(1000)}" for _ in range(self._rng.choice((10, 60, 250))))
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{self.canary} request {number}: {words}"}],
            "max_tokens": wanted,
            "extra_body": {"ignore_eos": True},
        }
        if number % 4 < 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def _default(self, clients: list[openai.AsyncOpenAI], number: int) -> None:
        outcome = self._outcome("default")
        begun = time.monotonic()
        client = clients[number // 2 % len(clients)]
        what = await self._try(client, self._body(number), outcome, begun)
        outcome.end(what, time.monotonic() - begun)

    async def _patient(self, clients: list[openai.AsyncOpenAI], number: int) -> None:
        outcome = self._outcome("patient")
        begun = time.monotonic()
        body = self._body(number)
        pause_s = 0.25
        while True:
            client = clients[(number // 2 + outcome.tries) % len(clients)]
            left_s = begun + PATIENCE_S - time.monotonic()
            try:
                async with asyncio.timeout(max(0.1, left_s)):
                    what = await self._try(client, body, outcome, begun)
            except TimeoutError:
                what = outcome.fail(outcome.failure or "time is up")
                break
            left_s = begun + PATIENCE_S - time.monotonic()
            if what in (OK, *SILENT) or left_s <= pause_s:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(3.0, 2.0 * pause_s)
        outcome.end(what, time.monotonic() - begun)

    def _outcome(self, user: str) -> Outcome:
        outcome = Outcome(user, time.monotonic() - self.begun)
        self.outcomes.append(outcome)
        return outcome

    async def _try(
        self, client: openai.AsyncOpenAI, body: dict[str, Any], outcome: Outcome, begun: float
    ) -> str:
        """Return what became of one call of the package: ok, what is wrong with its answer, or "failed"."""
        outcome.begin_try()
        seen = Seen()
        try:
            if body.get("stream"):
                async for event in await client.chat.completions.create(**body):
                    for choice in event.choices:
                        seen.add(choice.delta.content, choice.finish_reason)
                    if event.usage is not None:
                        seen.count(event.usage.completion_tokens)
            else:
                answer = await client.chat.completions.create(**body)
                seen.add(answer.choices[0].message.content, answer.choices[0].finish_reason)
                seen.count(answer.usage and answer.usage.completion_tokens)
        except (openai.OpenAIError, httpx2.HTTPError, json.JSONDecodeError) as e:
            cause = e.__cause__ or e
            name = (
                "transport"
                if "//fleet/" in str(client.base_url)
                else f"{client.base_url.host}:{client.base_url.port}"
            )
            return outcome.fail(f"{name}: {type(e).__name__}: {cause}"[:300])
        if seen.first_at is not None:
            outcome.see_first(seen.first_at - begun)
        return seen.verdict(body["max_tokens"])

    # -- what is asked afterwards ----------------------------------------------------------------------

    def counts(self) -> dict[str, Counter[str]]:
        """Return how often each outcome was, by kind of user."""
        found: dict[str, Counter[str]] = {"default": Counter(), "patient": Counter()}
        for outcome in self.outcomes:
            found[outcome.user][outcome.what or "unfinished"] += 1
        return found

    def write(self, path: Path) -> None:
        """Write every request that was not ok, a line each."""
        with path.open("w") as file:
            for o in self.outcomes:
                if o.what != OK:
                    file.write(json.dumps(o.__dict__) + "\n")
