"""Reads how busy the model server is from its /metrics: requests, KV memory, and token counters."""

import http.client
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

_FRESH_S = 0.2
"""A reading this old is as good as a new one."""

_TIMEOUT_S = 1.0
"""For a reading. One that takes longer than this on loopback is a model server that does not answer."""

_RATE_S = 1.0
"""The token rate is taken over at least so long."""

_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_use",
    "vllm:gpu_cache_usage_perc": "kv_use",  # its name before vLLM 0.10
    "vllm:prompt_tokens_total": "prompt_tokens_total",
    "vllm:generation_tokens_total": "generation_tokens_total",
}


@dataclass(frozen=True)
class ModelLoad:
    """One reading of the model server's figures; all are zero when it does not answer.

    kv_use: share of the KV memory in use, None where it is not known.
    """

    model_up: bool = False
    running: int = 0
    waiting: int = 0
    kv_use: float | None = None
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    tokens_s: float = 0.0


def parse_metrics(text: str) -> ModelLoad:
    """Return the reading in a page of Prometheus text.

    Figures of several engines are added up; of their KV use the mean is taken.
    """
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        name = _NAMES.get(line.partition("{")[0].partition(" ")[0])
        if name is None:
            continue
        try:
            found.setdefault(name, []).append(float(line.rsplit(" ", 1)[1]))
        except (ValueError, IndexError):
            continue

    def total(name: str) -> int:
        return int(sum(found.get(name, [])))

    kv = found.get("kv_use")
    return ModelLoad(
        model_up=True,
        running=total("running"),
        waiting=total("waiting"),
        kv_use=sum(kv) / len(kv) if kv else None,
        prompt_tokens_total=total("prompt_tokens_total"),
        generation_tokens_total=total("generation_tokens_total"),
    )


# --- outside world ---------------------------------------------------------------------------------


class ModelServer:
    """The model server on this machine. Safe in several threads: one reads, the others get its reading."""

    def __init__(
        self, port: int, local_key: str, certificate: str | None, clock: Callable[[], float]
    ) -> None:
        """Prepare to read from a port of this machine. clock: monotonic seconds.

        certificate: a file with the only one that the server may show; None: no TLS.
        """
        self._connection = _connection(port, certificate)
        self._headers = {"Authorization": f"Bearer {local_key}"}
        self._clock = clock
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._last = ModelLoad()
        self._base: tuple[float, int] | None = None

    def load(self, fresh_s: float = _FRESH_S) -> ModelLoad:
        """Return the last reading if it is at most fresh_s seconds old, else a new one."""
        with self._lock:
            if self._clock() - self._read_at > fresh_s:
                self._last = self._with_rate(self._read(), self._clock())
                self._read_at = self._clock()
            return self._last

    def _with_rate(self, load: ModelLoad, now: float) -> ModelLoad:
        if not load.model_up or self._base is None or load.generation_tokens_total < self._base[1]:
            self._base = (now, load.generation_tokens_total) if load.model_up else None
            return load
        at, before = self._base
        if now - at < _RATE_S:
            return replace(load, tokens_s=self._last.tokens_s)
        self._base = (now, load.generation_tokens_total)
        return replace(load, tokens_s=(load.generation_tokens_total - before) / (now - at))

    def _read(self) -> ModelLoad:
        for fresh in (False, True):  # the model server may just have closed a connection that was idle
            try:
                if fresh:
                    self._connection.close()
                self._connection.request("GET", "/metrics", headers=self._headers)
                reply = self._connection.getresponse()
                text = reply.read(4 * 2**20).decode(errors="replace")
                return parse_metrics(text) if reply.status == 200 else ModelLoad()
            except TimeoutError:
                break
            except (OSError, http.client.HTTPException):
                continue
        self._connection.close()
        return ModelLoad()


def _connection(port: int, certificate: str | None) -> http.client.HTTPConnection:
    """Return a connection to a port of this machine; with TLS only to a server with that certificate."""
    if certificate is None:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # It is its own anchor, and its dates say nothing (X509_V_FLAG_NO_CHECK_TIME has no name in ssl).
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(0x200000)
    context.load_verify_locations(certificate)
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=_TIMEOUT_S, context=context)
