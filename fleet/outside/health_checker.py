"""Makes health checks of instances: hears their word or reads their log, and sends a test prompt.

A running instance becomes hot when a test prompt, sent to the public address with a real token under TLS to
its own certificate, brought back at least one token. That it may be asked is known by its signed word, which
has the certificate. Where none came, or the machine does not answer, ssh is the second source: the log must
have the ready line and no fatal one. A certificate that was known before does without either.

A hot one is sent a prompt again and again, and now and then its log is read. A draining one is only asked how
many requests it still has.

A check says what it met: the machine itself, nobody, or that a fault of ours kept it from being made
(UNKNOWN). It writes nothing: what was found is for the turn to write down.
"""

import asyncio
import contextlib
import errno
import logging
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import paramiko

from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.outside.reach import connects
from fleet.outside.ssh_log import HostKeyChanged, LoginRanNothing, LogView, SshLog
from fleet.probe_prompts import CHATS, HEADERS, as_completion, as_embedding, probe
from fleet.slowness import ProbePace
from fleet.states import State
from instance_client import InstanceClient, PromptRefused, WrongCertificate
from process.errors import InstanceError
from process.safe_text import safe_text
from web.messages.reports import LoadReport

log = logging.getLogger("autoscaler")

T = TypeVar("T")


# --- outside world ---------------------------------------------------------------------------------

STALL_SHARE = 0.5
"""Share of a check's time that a machine has for the test prompt before it has stalled: in that time there
was a connection, or there would be another error (instance_client.py)."""

NO_CHAT_TEMPLATE = "no chat template: it answers completions and refuses chats"
"""Words of a fault of the model, by which fleet/blame.py knows it; a profile for completions only says so."""

NO_EVENTS = 2**53
"""Number of an event that never comes: with it as `after` a load report has no events."""


class HealthChecker:
    """Makes health checks of instances, any number at once; each has a timeout, so none delays another."""

    def __init__(
        self,
        client: InstanceClient,
        ssh: SshLog,
        master_token: Callable[[str], str],
        model: str,
        timeout_s: float,
        clock: Callable[[], float],
        rng: random.Random | None = None,
        long_prompt: int = 0,
        *,
        chats: bool = True,
        pooling: bool = False,
    ) -> None:
        """Prepare for checks. model: the served model's name. timeout_s: seconds for a whole check.

        long_prompt: characters of a test prompt for a machine that clients accuse; 0: as for others. chats:
        whether the model is one for chats, which must work before a machine is hot. pooling: it makes
        vectors, so its prompts are texts to be embedded.
        """
        self._chats, self._pooling = chats, pooling
        self._long_prompt = long_prompt
        self._client = client
        self._ssh = ssh
        self._master_token = master_token
        self._model = model
        self._timeout_s = timeout_s
        self._clock = clock
        self._rng = rng or random.Random()

    async def check(self, order: HealthCheckOrder) -> HealthCheck:
        """Make one health check; never raise, and never take longer than the timeout."""
        found = _Found(order, self._clock())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._look(order, found)
        except TimeoutError:
            found.note_stall(self._clock(), STALL_SHARE * self._timeout_s)
            return found(Verdict.FAILED, f"health check took over {self._timeout_s:g} s")
        except InstanceError as e:
            if _is_ours(e):
                return found(Verdict.UNKNOWN, f"a fault of ours: {e}")
            found.read_answer(e)
            return found(Verdict.FAILED, str(e))
        except Exception as e:  # an instance may answer anything: that must not keep it hot, nor end the loop
            log.exception("health check of %s: a fault of ours", order.label)
            return found(Verdict.UNKNOWN, f"health check: {type(e).__name__}, a fault of ours")

    async def _look(self, order: HealthCheckOrder, found: "_Found") -> HealthCheck:
        if order.auth_url is None or order.address is None:
            return found(Verdict.FAILED, "running, but the listing shows no ports")
        token = self._master_token(order.label)
        if order.state is State.DRAINING:
            load = await self._client.fetch_load(
                order.auth_url, token, NO_EVENTS, self._timeout_s, order.certificate
            )
            return found(Verdict.PASSED, "draining", _in_flight(load))
        if order.state is State.RUNNING and order.word:
            settled = await self._by_word(order, found)
        else:
            settled = await self._by_log(order, found) if order.read_log else None
        if settled is not None:
            return settled
        certificate = order.certificate if order.word else found.certificate or order.certificate
        auth_url, address = (_secure(url, certificate) for url in (order.auth_url, order.address))
        to_be_hot = self._chats and order.state is State.RUNNING
        characters = self._long_prompt if order.long_prompt else 0
        body = probe(self._rng, self._model, characters, 1.0 if to_be_hot else CHATS)
        if self._pooling:
            body = as_embedding(body)
        try:
            return await self._prompt(auth_url, address, token, body, certificate, found)
        except PromptRefused:
            if "messages" not in body:
                raise
            passed = await self._prompt(auth_url, address, token, as_completion(body), certificate, found)
            return found(Verdict.FATAL, NO_CHAT_TEMPLATE) if to_be_hot else passed

    async def _by_word(self, order: HealthCheckOrder, found: "_Found") -> HealthCheck | None:
        """Return what the machine's word says, if its auth_server agrees; None: it is to be sent a prompt."""
        if order.word == "ready":
            return None
        try:
            up = await self._is_up(order)
        except InstanceError as e:
            if _is_ours(e):
                raise
            return await self._by_log(order, found)
        said = f"it says: {order.word}"
        if order.word.startswith("failed"):
            found.meet()
            return None if up else found(Verdict.FATAL, said)
        return None if up else found(Verdict.LOADING, said)

    async def _by_log(self, order: HealthCheckOrder, found: "_Found") -> HealthCheck | None:
        """Return what the machine's log says; None: it is to be sent a prompt."""
        view = await self._read_log(order)
        found.read_log(view)
        if view.changed_host_key:
            # Whoever answers there, the word's certificate shows who answers the prompt.
            return None if order.word else found(Verdict.FATAL, "its ssh host key changed: refused")
        if view.fatal is not None:
            return found(Verdict.FATAL, f"fatal line in its log: {view.fatal}")
        if not view.ready and view.reached:
            return found(Verdict.LOADING, "the ready line is not in its log yet")
        if not view.reached and order.state is State.RUNNING:
            if order.certificate is None:
                # Whoever refuses ssh and listens at the other ports is there: its deadline holds.
                at = urlsplit(order.auth_url or "")
                if await connects(at.hostname, at.port, LISTENS_S):
                    found.meet()
                return found(Verdict.FAILED, view.why)
            if not await self._is_up(order):
                found.meet()
                return found(
                    Verdict.LOADING, f"its model server does not answer yet, and its log: {view.why}"
                )
        found.read_certificate(view.certificate)
        return None

    async def _is_up(self, order: HealthCheckOrder) -> bool:
        """Return whether the machine's model server answers, as its auth_server says; raise InstanceError."""
        url = _secure(order.auth_url or "", order.certificate)
        token = self._master_token(order.label)
        load = await self._client.fetch_load(url, token, NO_EVENTS, self._timeout_s, order.certificate)
        return load.model_up

    async def _prompt(
        self,
        auth_url: str,
        address: str,
        master: str,
        body: Mapping[str, Any],
        certificate: str | None,
        found: "_Found",
    ) -> HealthCheck:
        """Have a test prompt answered, with a token of its own."""
        limit_s = self._timeout_s
        batch = await self._client.fetch_tokens(auth_url, master, 1, limit_s, certificate)
        begun = self._clock()
        found.begin_prompt(begun)
        tokens = await self._client.test_prompt(address, batch.tokens[0], body, limit_s, certificate, HEADERS)
        found.end_prompt(ProbePace(self._clock() - begun, tokens))
        return found(Verdict.PASSED, f"test prompt: {tokens} token(s)", _in_flight(batch.load))

    async def _read_log(self, order: HealthCheckOrder) -> LogView:
        """Return what the instance's log says. Without ssh the check goes on: the prompt decides."""
        if order.ssh is None:
            return LogView(reached=False, why="the listing shows no ssh address")
        host, port = order.ssh
        hot = order.state is not State.RUNNING
        try:
            return await _in_thread(lambda: self._ssh.read(order.label, host, port, hot, self._timeout_s))
        except HostKeyChanged:
            return LogView(reached=True, changed_host_key=True)
        except LoginRanNothing as e:
            return LogView(reached=False, why=str(e), spoke=True)
        except InstanceError as e:
            if _is_ours(e):
                raise
            return LogView(reached=False, why=str(e))


class _Found:
    """Makes the result of one health check from what was met while the check went on."""

    def __init__(self, order: HealthCheckOrder, started_at: float) -> None:
        self.certificate: str | None = None
        self._answered = self._stranger = self._stalled = False
        self._prompt_at: float | None = None
        self._pace: ProbePace | None = None
        self._label = order.label
        self._started_at = started_at

    def read_certificate(self, certificate: str | None) -> None:
        """Keep the machine's certificate for the result."""
        self.certificate = certificate

    def read_log(self, view: LogView) -> None:
        """Note whom ssh met: the machine itself, or somebody with another host key."""
        self._answered = (view.reached or view.spoke) and not view.changed_host_key
        self._stranger = view.changed_host_key

    def meet(self) -> None:
        """Note that the machine's auth_server answered."""
        self._answered = True

    def begin_prompt(self, now: float) -> None:
        """Note that the machine has given a token, and is sent the test prompt."""
        self._prompt_at = now

    def end_prompt(self, pace: ProbePace) -> None:
        """Keep how fast the test prompt was answered."""
        self._prompt_at, self._pace = None, pace

    def note_stall(self, now: float, least_s: float) -> None:
        """Note that the check took too long: a stall, if the test prompt was waited for so long at least."""
        self._stalled = self._prompt_at is not None and now - self._prompt_at >= least_s

    def read_answer(self, error: InstanceError) -> None:
        """Note whether an error was an answer of the machine itself, though not the right one."""
        broken = (OSError, aiohttp.ClientError, EOFError, paramiko.SSHException, WrongCertificate)
        self._answered = self._answered or not any(isinstance(e, broken) for e in _causes(error))

    def __call__(self, verdict: Verdict, why: str, in_flight: int | None = None) -> HealthCheck:
        return HealthCheck(
            self._label,
            self._started_at,
            verdict,
            safe_text(why),
            in_flight,
            self.certificate,
            self._answered,
            self._stranger,
            self._pace,
            self._stalled,
        )


LISTENS_S = 3.0
"""Seconds for a connection to a machine's auth_server."""


OUR_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})
"""What the system says when this process or this computer has no more files, memory or ports."""


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error, the error that it was raised from, and so on."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__
    return found


def _is_ours(error: BaseException) -> bool:
    """Return whether an error is certainly a fault of this computer, and says nothing about the machine."""
    return any(isinstance(e, OSError) and e.errno in OUR_LIMITS for e in _causes(error))


def _secure(url: str, certificate: str | None) -> str:
    """Return a URL with https where the certificate that belongs to it is known, else as it is."""
    return url if certificate is None else url.replace("http://", "https://", 1)


def _in_flight(load: LoadReport) -> int | None:
    """Return how many requests an instance has, by its load report; None when its engine did not say."""
    return load.running + load.waiting if load.model_up else None


async def _in_thread(call: Callable[[], T]) -> T:
    """Make a blocking call in a thread of its own; return or raise what the call does.

    Hanging machines could use up all threads of a pool, and the process would wait for them at its end; it
    does not wait for a daemon thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return  # the check was given up meanwhile
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except Exception as e:  # noqa: BLE001 it is raised where the call is awaited
            error = e
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="ssh", daemon=True).start()
    return await future
