"""Tokens: single use under any race and restart, expiring, of one boot, capped; and the ring of events."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import instance_client
from remote import events, tokens
from remote.events import Event, Events
from remote.tokens import CAP, LIFE_S, SLOTS, TOKEN_CHARS, Gate, Issuer, TooMany
from tests.paths import ROOT


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that is soon gone round, as much larger than the cap as the real one."""
    monkeypatch.setattr(tokens, "SLOTS", SLOTS // 64)
    monkeypatch.setattr(tokens, "CAP", CAP // 64)


@pytest.fixture
def boot(tmp_path: Path) -> str:
    tokens.make_store(str(tmp_path))
    events.make_ring(str(tmp_path))
    return str(tmp_path)


@pytest.fixture
def gate(boot: str) -> Iterator[Gate]:
    gate = Gate(boot)
    yield gate
    gate.close()


def one(boot: str, now: float = 0.0) -> str:
    (token,) = Issuer(boot, now).issue(1, now)
    return token


# -- tokens --------------------------------------------------------------------------------------------


def test_a_token_admits_one_request_once(boot: str, gate: Gate) -> None:
    token = one(boot)
    assert [gate.take(token, 1.0) for _ in range(3)] == [True, False, False]


def test_a_token_is_a_random_looking_word_of_fixed_length(boot: str) -> None:
    made = Issuer(boot, 0.0).issue(100, 0.0)
    assert len(set(made)) == 100
    assert {len(token) for token in made} == {TOKEN_CHARS}


def test_a_token_expires(boot: str, gate: Gate) -> None:
    first, second = Issuer(boot, 0.0).issue(2, 0.0)
    assert gate.take(first, LIFE_S - 0.01)
    assert not gate.take(second, LIFE_S)


def test_a_token_of_another_boot_is_refused(
    boot: str, gate: Gate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = str(tmp_path_factory.mktemp("other"))
    tokens.make_store(other)
    assert not gate.take(one(other), 1.0)


def test_whoever_changes_a_token_has_none(boot: str, gate: Gate) -> None:
    token = one(boot)
    for at in range(len(token)):
        other = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        assert not gate.take(other, 1.0), f"changed at {at}"
    assert gate.take(token, 1.0)


@pytest.mark.parametrize("word", ["", "x", "A" * 38, "A" * 37 + "=", "é" * 38, "A" * 1_000_000, " " * 38])
def test_a_word_that_is_no_token_is_refused(gate: Gate, word: str) -> None:
    assert not gate.take(word, 1.0)


def test_a_second_spelling_of_a_token_is_refused(boot: str, gate: Gate) -> None:
    """Its request would have a name that the loadbalancer does not know."""
    token = one(boot)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    twins = [token[:-1] + alphabet[last ^ bits] for bits in range(1, 16)]
    assert not any(gate.take(twin, 1.0) for twin in twins)
    assert gate.take(token, 1.0)


def test_a_spent_token_stays_spent_when_either_process_starts_anew(boot: str) -> None:
    issuer = Issuer(boot, 0.0)
    first, second = issuer.issue(2, 0.0)
    gate = Gate(boot)
    assert gate.take(first, 1.0)
    gate.close()
    issuer.close()
    again, third = Gate(boot), Issuer(boot, 2.0).issue(1, 2.0)[0]
    assert [again.take(t, 3.0) for t in (first, second, third)] == [False, True, True]


def test_a_thousand_racing_takers_in_threads_admit_one(boot: str, gate: Gate) -> None:
    token = one(boot)
    taken: list[bool] = []
    begin = threading.Event()

    def take() -> None:
        begin.wait()
        taken.extend(gate.take(token, 1.0) for _ in range(50))

    threads = [threading.Thread(target=take) for _ in range(20)]
    for thread in threads:
        thread.start()
    begin.set()
    for thread in threads:
        thread.join()
    assert (len(taken), sum(taken)) == (1000, 1)


RACER = """
import sys
from remote.tokens import Gate
gate, tokens = Gate(sys.argv[1]), sys.stdin.read().split()
print(sum(gate.take(t, 1.0) for t in tokens))
"""


def test_racing_processes_admit_each_token_once(boot: str) -> None:
    """As when a model server runs more than one API process."""
    made = Issuer(boot, 0.0).issue(1000, 0.0)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, boot],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n".join(made))
        racer.stdin.flush()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()
        racer.stdin = None
    won = [int(racer.communicate(timeout=30)[0]) for racer in racers]
    assert sum(won) == 1000


def test_no_more_than_the_cap_are_outstanding_until_some_are_spent_or_expire(boot: str, gate: Gate) -> None:
    issuer = Issuer(boot, 0.0)
    first = issuer.issue(CAP, 0.0)
    assert issuer.outstanding(1.0) == CAP
    with pytest.raises(TooMany):
        issuer.issue(1, 1.0)
    assert all(gate.take(token, 2.0) for token in first[:10])
    second = issuer.issue(10, 3.0)
    with pytest.raises(TooMany):
        issuer.issue(1, 3.0)
    assert all(gate.take(token, 4.0) for token in second)
    assert len(issuer.issue(CAP - 10, LIFE_S)) == CAP - 10


def test_round_the_ring_no_outstanding_token_loses_its_slot(small_ring: None, boot: str, gate: Gate) -> None:
    issuer = Issuer(boot, 0.0)
    kept = issuer.issue(5, 0.0)
    for _ in range(2 * tokens.SLOTS // 800 + 1):
        assert all(gate.take(token, 1.0) for token in issuer.issue(800, 1.0))
    assert all(gate.take(token, 2.0) for token in kept)


def test_after_a_restart_the_cap_counts_what_was_issued_before(boot: str) -> None:
    Issuer(boot, 0.0).issue(CAP, 0.0)
    issuer = Issuer(boot, 1.0)
    with pytest.raises(TooMany):
        issuer.issue(1, 2.0)
    assert len(issuer.issue(1, 1.0 + LIFE_S)) == 1


def test_after_a_restart_what_had_expired_does_not_count(boot: str) -> None:
    """Else the stock of a quiet day, none of it spent, would stop the issuing for ten minutes."""
    issuer, now = Issuer(boot, 0.0), 0.0
    for _ in range(3):
        issuer.issue(CAP // 2, now)
        now += LIFE_S
    last = issuer.issue(10, now)
    issuer.close()
    again = Issuer(boot, now)
    assert again.outstanding(now) == 10
    assert len(again.issue(CAP - 10, now)) == CAP - 10
    gate = Gate(boot)
    assert all(gate.take(token, now + 1.0) for token in last)


def test_a_token_that_the_ring_has_been_round_still_counts_after_a_restart(
    small_ring: None, boot: str, gate: Gate
) -> None:
    issuer = Issuer(boot, 0.0)
    kept = issuer.issue(5, 0.0)
    for _ in range(2 * tokens.SLOTS // 800 + 1):
        assert all(gate.take(token, 1.0) for token in issuer.issue(800, 1.0))
    issuer.close()
    again = Issuer(boot, 2.0)
    assert again.outstanding(2.0) == 5
    again.issue(tokens.SLOTS // 2, 2.0)
    assert all(gate.take(token, 3.0) for token in kept)


def test_both_sides_give_a_request_the_same_name() -> None:
    for token in ("a", "token", "x" * TOKEN_CHARS):
        assert tokens.request_id(token) == instance_client.request_id(token)


def test_keys_and_slots_are_for_their_owner_only(boot: str) -> None:
    for name in ("token.key", "spent", "events"):
        assert os.stat(os.path.join(boot, name)).st_mode & 0o077 == 0, name


# -- events --------------------------------------------------------------------------------------------

A, B = "0123456789abcdef", "fedcba9876543210"


def test_events_are_told_in_order_after_a_number(boot: str) -> None:
    ring = Events(boot)
    ring.write(A, events.STARTED)
    ring.write(B, events.STARTED)
    ring.write(A, events.FINISHED, 12)
    news = ring.after(1)
    assert (news.seq, news.missed) == (3, False)
    assert news.events == (Event(B, "started"), Event(A, "finished", 12))
    assert ring.after(3).events == ()


def test_events_survive_their_writer(boot: str) -> None:
    ring = Events(boot)
    ring.write(A, events.ABORTED, 3)
    ring.close()
    assert Events(boot).after(0).events == (Event(A, "aborted", 3),)


def test_a_number_from_another_boot_gets_all_there_is(boot: str) -> None:
    ring = Events(boot)
    ring.write(A, events.STARTED)
    assert ring.after(1_000_000).events == (Event(A, "started"),)


def test_who_asks_too_late_is_told_that_events_are_missing(
    boot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RECORDS", 8)
    ring = Events(boot)
    for _ in range(20):
        ring.write(A, events.STARTED)
    late, in_time = ring.after(2), ring.after(12)
    assert (late.seq, late.missed, len(late.events)) == (20, True, 8)
    assert (in_time.missed, len(in_time.events)) == (False, 8)


def test_round_the_ring_events_stay_in_order(boot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RECORDS", 8)
    ring = Events(boot)
    for n in range(1, 30):
        ring.write(A, events.FINISHED, n)
        for seq in range(max(0, n - 8), n + 1):
            assert [e.size for e in ring.after(seq).events] == list(range(seq + 1, n + 1))


def test_requests_of_a_dead_model_server_have_failed(boot: str) -> None:
    ring = Events(boot)
    ring.write(A, events.STARTED)
    ring.write(B, events.STARTED)
    ring.write(A, events.FINISHED, 5)
    assert ring.fail_open() == 1
    assert ring.after(3).events == (Event(B, "failed"),)
    assert ring.fail_open() == 0
