"""Logs in JSON: a row a line, or one document.

    Mooncake      timestamp (ms), input_length, output_length, hash_ids
    Qwen-Bailian  chat_id, parent_chat_id, timestamp (s), input_length, output_length, type, turn, hash_ids
    AIPerf        as Mooncake; session_id and delay (ms after the turn before) instead of timestamp,
                  text_input instead of input_length
    AIPerf's      profile_export.jsonl: metadata.request_start_ns, metrics.input_sequence_length.value …
    conversations conversations (ShareGPT), conversation or messages: turns with from/value or role/content,
                  with a time of the whole or of each turn
    guidellm      benchmarks[].requests.successful[]: start_time, prompt_tokens, output_tokens

Other names of these fields are in simulation/traces/columns.py. Requests whose prompts begin with the same
block (Mooncake) or whose chat goes on (Bailian) are of one session; in Mooncake's older trace all do, and
there that says nothing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from simulation.traces import columns
from simulation.traces.mistakes import FARTHEST_S, check_tokens, wrong
from simulation.traces.request import ReadNotes
from simulation.traces.time_units import seconds_of_date, unit_in

TURN_S = 60.0
"""Seconds from one turn of a conversation to the next where only its begin has a time: reading and typing."""

_RULE = f"one for {columns.BYTES_PER_TOKEN} bytes"

_TALKS = ("conversations", "conversation", "messages")

FARTHEST = FARTHEST_S * 1e9
"""Largest number that a time can be, in nanoseconds."""


class LogRow(NamedTuple):
    """A request as a row says it. name: of the field that has the time.

    at: in `unit`, None: that of the log. delay_s: instead of it, seconds after the row before in its session.
    """

    line: int
    at: float
    unit: str | None
    prompt_tokens: int
    output_tokens: int
    session: int
    delay_s: float | None = None
    name: str = "timestamp"


@dataclass
class JsonRows:
    """Reads the objects of one log. all_at_once: they are in no order of time. chats: of Qwen-Bailian."""

    path: Path
    notes: ReadNotes
    all_at_once: bool = False
    chats: bool = False
    _roots: dict[Any, Any] = field(default_factory=dict)  # chat -> the chat that it goes on from

    def rows(self, line: int, said: object, where: str = "") -> Iterator[LogRow]:
        """Yield the requests of one object: one, or of a conversation one for each answer."""
        if not isinstance(said, dict):
            wrong(self.path, line, f"{where}wanted a JSON object, got {said!r:.40}")
        metadata, metrics = said.get("metadata"), said.get("metrics")
        if isinstance(metadata, dict) and isinstance(metrics, dict):
            yield from self._exported(line, said, metadata, metrics)
            return
        turns = next(
            (said[n] for n in ("conversations", "conversation", "messages") if _is_talk(said, n)), None
        )
        if turns is not None:
            yield from self._conversation(line, said, turns)
            return
        yield self._request(line, {columns.plain(name): value for name, value in said.items()}, where)

    # -- a request a row --

    def _request(self, line: int, said: Mapping[str, Any], where: str) -> LogRow:
        name = columns.first_of(columns.TIMES, said)
        delay = said.get("delay")
        if name is None and delay is None:
            wrong(self.path, line, f"{where}timestamp is missing")
        at, unit = (math.nan, None) if name is None else self._time(line, name, said[name])
        delay_s = None
        if name is None:
            delay_s = self._number(line, "delay", delay) / 1e3
            self.all_at_once = True
            self.notes.say("delay", "delays count from the time at which the turn before was sent")
        prompt = self._length(line, said, columns.PROMPTS, columns.TEXTS, f"{where}input_length")
        output = self._length(line, said, columns.OUTPUTS, columns.ANSWERS, f"{where}output_length")
        return LogRow(line, at, unit, prompt, output, self._session(said), delay_s, name or "delay")

    def _length(
        self, line: int, said: Mapping[str, Any], lengths: tuple[str, ...], texts: tuple[str, ...], what: str
    ) -> int:
        if (name := columns.first_of(lengths, said)) is not None:
            return check_tokens(self.path, line, name, said[name])
        if (name := columns.first_of(texts, said)) is None:
            wrong(self.path, line, f"{what} is missing")
        self.notes.say(name, f"tokens of {name} are counted by its text, {_RULE}")
        return check_tokens(self.path, line, name, columns.tokens_in(said[name]))

    def _session(self, said: Mapping[str, Any]) -> int:
        if said.get("chat_id") is not None:
            self.chats = True
            chat, before = said["chat_id"], said.get("parent_chat_id")
            root = self._roots.get(_key(before), _key(chat))
            self._roots[_key(chat)] = root
            return columns.session_of(root)
        self.chats = self.chats or said.get("turn") is not None
        if (name := columns.first_of(columns.SESSIONS, said)) is not None:
            return columns.session_of(said[name])
        blocks = said.get("hash_ids")
        return columns.session_of(blocks[0]) if isinstance(blocks, list) and blocks else -1

    def _time(self, line: int, name: str, value: object) -> tuple[float, str | None]:
        """Return a time and its unit, None: that of the log."""
        if isinstance(value, str):
            try:
                return seconds_of_date(value), "s"
            except ValueError:
                try:
                    value = float(value)
                except ValueError:
                    wrong(self.path, line, f"{name}: wanted a time, got {value!r:.40}")
        return self._number(line, name, value), unit_in(name)

    def _number(self, line: int, name: str, value: object) -> float:
        # First the bounds: an int of 400 digits is no float.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -FARTHEST <= value <= FARTHEST
        ):
            wrong(self.path, line, f"{name}: wanted a time, got {value!r:.40}")
        return float(value)

    # -- AIPerf's records --

    def _exported(
        self, line: int, said: Mapping[str, Any], metadata: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Iterator[LogRow]:
        self.all_at_once = True  # they stand in the order in which they ended
        if said.get("error") is not None or metadata.get("was_cancelled"):
            self.notes.count_failed()
            return
        if metadata.get("request_start_ns") is None:
            wrong(self.path, line, "metadata.request_start_ns is missing")
        at = self._number(line, "metadata.request_start_ns", metadata["request_start_ns"])
        lengths: list[int] = []
        for name in ("input_sequence_length", "output_sequence_length"):
            metric = metrics.get(name)
            if not isinstance(metric, dict) or metric.get("value") is None:
                wrong(self.path, line, f"metrics.{name}.value is missing")
            lengths.append(check_tokens(self.path, line, f"metrics.{name}", metric["value"]))
        session = metadata.get("conversation_id")
        prompt, output = lengths
        session = -1 if session is None else columns.session_of(session)
        yield LogRow(line, at, "ns", prompt, output, session, name="metadata.request_start_ns")

    # -- conversations --

    def _conversation(self, line: int, said: Mapping[str, Any], turns: list[Any]) -> Iterator[LogRow]:
        plain = {columns.plain(name): value for name, value in said.items()}
        name = columns.first_of(columns.TIMES, plain)
        begun = None if name is None else self._time(line, name, plain[name])
        key = columns.first_of(("id", *columns.SESSIONS, "conversation_hash"), plain)
        session = columns.named(f"line {line}" if key is None else str(plain[key]))
        self.all_at_once = True
        self.notes.say(
            "talk",
            f"tokens of conversations are counted by their text, {_RULE}",
        )
        before = answers = 0
        asked: tuple[float, str | None] | None = None
        for turn in turns:
            role = str(turn.get("from", turn.get("role", "")))
            tokens = columns.tokens_in(turn)
            stamp = columns.first_of(columns.TIMES, turn)
            if role in ("gpt", "assistant", "chatgpt", "bot", "model") and before and tokens:
                at = asked or begun
                if at is None:
                    wrong(self.path, line, "timestamp is missing: of the conversation, or of each turn")
                if asked is None and answers:
                    self.notes.say("turns", f"turns without a time come {TURN_S:g} s after the one before")
                delay_s = TURN_S if asked is None and answers else None
                yield LogRow(line, at[0], at[1], before, tokens, session, delay_s, name or "timestamp")
                answers += 1
                asked = None
            elif stamp is not None:
                asked = self._time(line, stamp, turn[stamp])
            before += tokens


def _is_talk(said: Mapping[str, Any], name: str) -> bool:
    """Return whether that field has the turns of a conversation with its answers, and no length is said."""
    turns = said.get(name)
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) for turn in turns)
        and columns.first_of((*columns.PROMPTS, *columns.OUTPUTS), said) is None
    )


def _key(chat: object) -> object:
    """Return what names a chat, as a key."""
    return chat if isinstance(chat, int | str) else str(chat)


def of_guidellm(
    said: Mapping[str, Any], path: Path, notes: ReadNotes
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the requests of guidellm's report as rows, each with where it stands."""
    runs = said.get("benchmarks")
    if not isinstance(runs, list):
        wrong(path, 1, "benchmarks is missing: of JSON documents those of guidellm are read")
    if len(runs) > 1:
        notes.say("runs", f"{len(runs)} benchmarks are in it, all are read")
    for run, benchmark in enumerate(runs):
        groups = benchmark.get("requests") if isinstance(benchmark, dict) else None
        if isinstance(groups, list):
            groups = {"successful": groups}
        if not isinstance(groups, dict) or not isinstance(groups.get("successful"), list):
            wrong(path, 1, f"benchmarks[{run}].requests.successful is missing")
        for name in ("incomplete", "errored"):
            for _ in groups.get(name) or ():
                notes.count_failed()
        for number, one in enumerate(groups["successful"]):
            where = f"benchmarks[{run}].requests.successful[{number}]: "
            if not isinstance(one, dict):
                wrong(path, 1, f"{where}wanted a JSON object, got {one!r:.40}")
            yield where, _flat(one)


def _flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request of guidellm with the names that rows have; versions differ in where they stand."""
    timings = _inside(_inside(one, "info"), "timings")
    times = (one.get("request_start_time"), one.get("start_time"), timings.get("request_start"))
    lengths = {
        side: one.get(f"{words}_tokens")
        or _inside(one, f"{side}_metrics").get("total_tokens")
        or _inside(one, f"{side}_metrics").get("text_tokens")
        for side, words in (("input", "prompt"), ("output", "output"))
    }
    at = next((t for t in times if t is not None), None)
    return {"timestamp": at, "input_length": lengths["input"], "output_length": lengths["output"]}


def _inside(one: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = one.get(name)
    return found if isinstance(found, dict) else {}
