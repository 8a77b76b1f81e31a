"""What the loadbalancer promises, sentence by sentence. Time is a number; there is no I/O."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

import loadbalancer as lb
from dispatch.instance import FLOOR, STOCK_LEAST, Instance
from dispatch.types import Ask, Lease, Poll, Refill, Waiter
from engine.forward import PROMPT
from engine.slo import Slo
from engine.timing import TIMINGS, Timing
from loadbalancer import LoadBalancer
from tests.messages import load_report, request_end
from web.messages.hot_set import HotInstance, HotSet, HotTiming
from web.messages.reports import PushedReport

T0 = 1_700_000_000.0


def instance(
    id: int,
    throughput: float = 100.0,
    hold_s: float = 10.0,
    *,
    draining: bool = False,
    timing: Timing | None = None,
) -> HotInstance:
    """One that may hold ten seconds of a hundred work/s."""
    return HotInstance(
        id=id,
        state="draining" if draining else "hot",
        address=f"http://10.0.0.{id}:8000",
        auth_url=f"http://10.0.0.{id}:3000",
        master_token="m" * 64,
        throughput_work_s=throughput,
        capacity_work=throughput * hold_s,
        timing=None if timing is None else HotTiming.of(timing),
    )


@dataclass
class Bench:
    """A LoadBalancer, a clock, and instances that give tokens whenever they are asked."""

    balancer: LoadBalancer
    now: float = T0
    version: int = 0
    issued: int = 0
    boots: dict[int, str] = field(default_factory=dict)

    def hot(self, *instances: HotInstance, expected_hot_s: float | None = None) -> bool:
        """A new hot set, and tokens for all of it."""
        self.version += 1
        taken = self.balancer.replace_hot(
            HotSet("epoch1", self.version, "vllm-13", 0.1, 200.0, expected_hot_s, instances), self.now
        )
        self.refill()
        return taken

    def refill(self, expires_in_s: float = 600.0) -> list[Refill]:
        """Answer all refills there are."""
        done: list[Refill] = []
        while asked := self.balancer.refills(self.now):
            for one in asked:
                tokens = [f"token{self.issued + n}" for n in range(one.count)]
                self.issued += one.count
                boot = self.boots.get(one.instance_id, "boot1")
                self.balancer.add_tokens(one, boot, tokens, expires_in_s, 0, self.now)
            done += asked
        return done

    def ask(self, work: float = 100.0, **more: object) -> Lease | None:
        """Route one request."""
        ask = Ask(work, **more)  # type: ignore[arg-type]
        self.balancer.arrived(ask)
        return self.balancer.route(ask, self.now)

    def lease(self, work: float = 100.0, **more: object) -> Lease:
        """Route one request that must get a lease."""
        lease = self.ask(work, **more)
        assert lease is not None
        return lease

    def tick(self, seconds: float) -> None:
        """Time passes, and the loadbalancer looks at its watch every second of it."""
        while seconds > 0.0:
            step = min(1.0, seconds)
            self.now += step
            seconds -= step
            self.balancer.tick(self.now)

    def poll(self, id: int) -> Poll:
        """A poll of that instance, whether or not it is due."""
        return Poll(instance(id), 0)

    def report(self, id: int, **what: object) -> None:
        """That instance reports."""
        self.balancer.report(self.poll(id), load_report(**what), self.now)

    def work(self, id: int) -> float:
        """The work that instance is taken to have."""
        return self.balancer.usage(self.now).instances[id].work

    def row(self, id: int) -> dict[str, object]:
        """Its line in the description."""
        return next(r for r in self.balancer.describe(self.now) if r["id"] == id)


def bench(*instances: HotInstance, seed: int = 1, **settings: Any) -> Bench:
    """A loadbalancer that knows these instances."""
    made = Bench(LoadBalancer(random.Random(seed), lambda token: f"id-{token}", **settings))
    if instances:
        made.hot(*instances)
    return made


# -- the choice ------------------------------------------------------------------------------------------


def test_a_request_goes_to_the_instance_that_is_done_with_it_first() -> None:
    b = bench(instance(1), instance(2))
    first = b.lease()
    assert b.lease().instance_id != first.instance_id


def test_as_many_requests_as_idle_instances_take_one_each() -> None:
    b = bench(*(instance(i) for i in range(1, 51)))
    assert Counter(b.lease().instance_id for _ in range(50)) == Counter(range(1, 51))


def test_equal_instances_are_chosen_among_by_chance() -> None:
    firsts = {bench(*(instance(i) for i in range(1, 6)), seed=seed).lease().instance_id for seed in range(30)}
    assert len(firsts) > 1


def test_an_idle_fast_machine_is_preferred_to_an_idle_slow_one() -> None:
    b = bench(*(instance(i) for i in range(1, 20)), instance(20, throughput=300.0))
    assert b.lease().instance_id == 20


def test_work_is_compared_in_seconds_between_machines_of_unequal_speed() -> None:
    """100 work takes 1 s on the slow and 1/3 s on the fast, which is the better place for the first three."""
    b = bench(instance(1), instance(2, throughput=300.0))
    for best in (2, 2, 2, 1):
        inst = b.balancer._candidates(100.0, (), b.now)[0]
        assert inst.id == best
        assert b.lease(avoid=(3 - best,)).instance_id == best


def test_the_request_goes_where_it_does_least_to_everybody() -> None:
    """Four at once share the steps of the fast one and are still done sooner than one on the slow one."""
    b = bench(instance(1), instance(2, throughput=300.0))
    assert [b.lease().instance_id for _ in range(4)] == [2, 2, 2, 2]


def test_the_share_of_the_work_follows_the_speed_when_there_is_much_of_it() -> None:
    b = bench(instance(1, hold_s=100.0), instance(2, throughput=300.0, hold_s=100.0))
    given: Counter[int] = Counter()
    for _ in range(200):
        given[b.lease(10.0).instance_id] += 1
        b.refill()
    assert 150 <= given[2] < 200, "as many as its speed, and more, for steps are shared"


def test_the_choice_among_a_thousand_looks_at_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench(*(instance(i) for i in range(1, 1001)))
    looked = 0
    work = Instance.work

    def counted(self: Instance, now: float) -> float:
        nonlocal looked
        looked += 1
        return work(self, now)

    monkeypatch.setattr(Instance, "work", counted)
    for _ in range(2000):
        b.now += 0.001
        b.lease(10.0)
    assert looked / 2000 < 25


def test_an_instance_to_avoid_gets_nothing() -> None:
    b = bench(instance(1), instance(2))
    assert {b.lease(10.0, avoid=(1,)).instance_id for _ in range(20)} == {2}


def test_nobody_is_sent_where_he_must_not_go_even_when_there_is_no_other() -> None:
    assert bench(instance(1)).ask(avoid=(1,)) is None


def test_avoided_instances_at_the_head_of_the_queue_do_not_hide_those_behind() -> None:
    b = bench(*(instance(i) for i in range(1, 31)))
    assert b.lease(avoid=tuple(range(1, 30))).instance_id == 30


# -- capacity --------------------------------------------------------------------------------------------


def test_an_instance_is_given_no_more_than_its_capacity() -> None:
    b = bench(instance(1))
    assert [b.ask(300.0) is not None for _ in range(4)] == [True, True, True, False]
    assert b.lease(100.0)


def test_an_idle_instance_takes_one_request_of_any_size() -> None:
    b = bench(instance(1))
    assert b.lease(50_000.0)
    assert b.ask(1.0) is None


def test_an_instance_that_others_keep_busy_is_not_idle() -> None:
    b = bench(instance(1))
    b.report(1, running=20)
    assert b.ask(50_000.0) is None


def test_full_instances_at_the_head_do_not_hide_one_with_another_limit() -> None:
    b = bench(*(instance(i, hold_s=2.0) for i in range(1, 30)), instance(30, hold_s=60.0))
    leases = [b.ask(150.0) for _ in range(60)]
    assert sum(x is not None for x in leases) == 60


# -- work between reports --------------------------------------------------------------------------------


def test_between_reports_work_drains_at_the_throughput_but_never_below_half_of_what_is_unfinished() -> None:
    b = bench(instance(1))
    b.lease(400.0)
    seen = []
    for _ in range(4):
        seen.append(b.work(1))
        b.now += 1.0
    assert seen == pytest.approx([400.0, 300.0, 200.0, 200.0])


def test_what_has_drained_by_the_estimate_makes_room() -> None:
    b = bench(instance(1))
    b.lease(1000.0)
    assert b.ask(300.0) is None
    b.now += 3.0
    assert b.lease(300.0)


def test_a_report_sets_the_work_to_that_of_the_unfinished_leases() -> None:
    b = bench(instance(1))
    one, two = b.lease(400.0), b.lease(100.0)
    b.now += 4.0
    b.report(1, started=(one.request_id, two.request_id), ended=(request_end(two.request_id),), running=1)
    assert b.work(1) == pytest.approx(400.0)
    assert b.row(1)["unfinished"] == 1


def test_an_overdue_instance_is_not_mistaken_for_an_idle_one() -> None:
    b = bench(instance(1), instance(2))
    late = b.lease(400.0)
    b.now += 60.0
    assert {b.lease(1.0).instance_id for _ in range(2)} == {3 - late.instance_id}


def test_requests_of_others_count_until_a_report_says_they_are_gone() -> None:
    b = bench(instance(1), instance(2))
    b.report(1, running=3)
    assert b.work(1) > 0.0
    b.report(1, running=0)
    assert b.work(1) == 0.0


def test_a_request_of_others_is_as_long_as_its_instance_says() -> None:
    """Prompts of 250 tokens take 1,000 bytes here; who has been given a long one is asked last."""
    b = bench(instance(1), instance(2), instance(3))
    own = b.balancer.route(Ask(100.0, prompt_tokens=250), b.now)
    other = b.balancer.route(Ask(100.0, prompt_tokens=9000), b.now)
    assert own is not None
    assert other is not None
    b.report(own.instance_id, started=(own.request_id,), started_bytes=(1000,), running=1)
    b.report(other.instance_id, started=(other.request_id,), started_bytes=(36_000,), running=1)
    for lease in (own, other):
        b.balancer.done(lease.request_id, "finished", b.now)
    for id, size in ((1, 400), (2, 20_000), (3, 0)):
        b.report(id, started=(f"stranger{id}",), started_bytes=(size,), running=1)
    told = b.balancer._instances
    assert told[1].belief.rows[0, PROMPT] == pytest.approx(100.0)
    assert told[2].belief.rows[0, PROMPT] == pytest.approx(5000.0)
    assert told[3].belief.rows[0, PROMPT] == pytest.approx(b.balancer._usual[PROMPT])
    assert b.work(1) < b.work(2)
    check_books(b)


def test_what_others_do_counts_from_push_to_push() -> None:
    b = bench(instance(1), instance(2))
    for id in (1, 2):
        b.report(id)
    told = PushedReport("boot1", 1, 0, 1, False, ("stranger",), (), True)
    assert b.balancer.pushed(1, told, b.now) == pytest.approx(0.02)
    assert b.work(1) > 0.0
    assert b.lease(10.0).instance_id == 2
    ended = PushedReport("boot1", 2, 1, 2, False, (), (request_end("stranger"),), True)
    assert b.balancer.pushed(1, ended, b.now) == pytest.approx(0.1)
    assert b.work(1) == 0.0
    check_books(b)


def test_when_all_of_the_others_have_gone_an_instance_is_idle() -> None:
    """To the last bit: sums of sizes that are no binary fractions."""
    b = bench(instance(1))
    own = b.balancer.route(Ask(100.0, prompt_tokens=9000), b.now)
    assert own is not None
    b.report(1, started=(own.request_id,), started_bytes=(27_001,), running=1)
    b.balancer.done(own.request_id, "finished", b.now)
    names = [f"other{n}" for n in range(9)]
    for number, (names_in, names_out) in enumerate([(names, []), ([], names[3:] + names[:3])], start=1):
        sizes = tuple(1000 + 37 * n for n in range(len(names_in)))
        ended = tuple(request_end(name) for name in names_out)
        told = PushedReport("boot1", number, number - 1, number, False, tuple(names_in), ended, True, sizes)
        b.balancer.pushed(1, told, b.now)
        assert b.balancer._instances[1].idle is (number == 2)
    assert b.lease(50_000.0)
    check_books(b)


def test_a_start_that_comes_after_its_end_is_no_strangers() -> None:
    """The client was first to say that it has its answer."""
    b = bench(instance(1))
    lease = b.lease(10.0)
    b.balancer.done(lease.request_id, "finished", b.now)
    told = PushedReport("boot1", 1, 0, 1, False, (lease.request_id,), (), True)
    assert b.balancer.pushed(1, told, b.now) == pytest.approx(0.1)
    assert b.work(1) == 0.0
    check_books(b)


# -- how leases end --------------------------------------------------------------------------------------


def test_an_instance_that_is_done_early_is_chosen_next() -> None:
    b = bench(*(instance(i) for i in range(1, 31)))
    leases = [b.lease(500.0) for _ in range(30)]
    b.balancer.done(leases[17].request_id, "finished", b.now)
    assert b.lease(500.0).instance_id == leases[17].instance_id


@pytest.mark.parametrize("outcome", ["finished", "failed", "unused"])
def test_a_lease_its_client_ends_frees_its_work_once(outcome: str) -> None:
    b = bench(instance(1))
    lease = b.lease(700.0)
    assert b.balancer.done(lease.request_id, outcome, b.now)
    assert not b.balancer.done(lease.request_id, outcome, b.now)
    assert b.work(1) == 0.0


def test_the_end_of_an_unknown_lease_changes_nothing() -> None:
    b = bench(instance(1))
    assert not b.balancer.done("id-nobody", "failed", b.now)
    assert b.row(1)["failures"] == 0


def test_a_lease_that_never_started_expires() -> None:
    b = bench(instance(1), lease_s=60.0)
    b.lease(700.0)
    b.tick(59.0)
    assert b.row(1)["unfinished"] == 1
    b.tick(2.0)
    assert b.row(1)["unfinished"] == 0
    assert b.balancer.ends == {"expired": 1}


def test_a_lease_that_started_does_not_expire_until_an_hour_has_passed() -> None:
    b = bench(instance(1), lease_s=60.0)
    lease = b.lease(700.0)
    b.report(1, started=(lease.request_id,), running=1)
    b.tick(3500.0)
    assert b.row(1)["unfinished"] == 1
    b.tick(110.0)
    assert b.balancer.ends == {"lost": 1}


def test_a_started_lease_does_not_keep_later_ones_from_expiring() -> None:
    b = bench(instance(1), lease_s=60.0)
    started = b.lease(100.0)
    b.report(1, started=(started.request_id,), running=1)
    b.tick(1.0)
    b.lease(100.0)
    b.tick(61.0)
    assert b.row(1)["unfinished"] == 1


def test_a_lease_whose_end_was_lost_is_over_when_two_reports_say_that_nothing_runs() -> None:
    b = bench(instance(1))
    lease = b.lease(100.0)
    b.report(1, started=(lease.request_id,), running=1)
    b.report(1, running=0)
    assert b.row(1)["unfinished"] == 1
    b.report(1, running=0)
    assert b.row(1)["unfinished"] == 0


def test_a_lease_that_started_just_now_is_not_over_because_the_figures_lag_behind_the_events() -> None:
    b = bench(instance(1))
    b.report(1, running=0)
    lease = b.lease(100.0)
    b.report(1, started=(lease.request_id,), running=0)
    assert b.row(1)["unfinished"] == 1


def test_a_lease_on_its_way_is_not_over_because_nothing_runs_yet() -> None:
    b = bench(instance(1))
    b.lease(100.0)
    for _ in range(5):
        b.report(1)
    assert b.row(1)["unfinished"] == 1


def test_the_expiry_told_to_the_client_is_never_after_the_token_dies() -> None:
    b = bench(lease_s=60.0)
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1),)), b.now)
    b.refill(expires_in_s=30.0)
    assert b.lease().expires_at == T0 + 30.0


# -- tokens ----------------------------------------------------------------------------------------------


def test_no_token_is_leased_twice() -> None:
    b = bench(instance(1, throughput=1e6))
    tokens = []
    for _ in range(500):
        tokens.append(b.lease(1.0).token)
        b.refill()
    assert len(set(tokens)) == 500


def test_an_unused_token_goes_back_and_is_leased_again() -> None:
    b = bench(instance(1))
    lease = b.lease()
    b.balancer.done(lease.request_id, "unused", b.now)
    assert b.lease().token == lease.token


def test_a_token_that_was_taken_does_not_go_back_whatever_its_client_says() -> None:
    b = bench(instance(1))
    lease = b.lease()
    b.report(1, started=(lease.request_id,), running=1)
    b.balancer.done(lease.request_id, "unused", b.now)
    assert all(b.lease(1.0).token != lease.token for _ in range(60))


def test_an_instance_that_gives_a_token_twice_does_not_get_two_leases_for_it() -> None:
    b = bench()
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1),)), b.now)
    (refill,) = b.balancer.refills(b.now)
    b.balancer.add_tokens(refill, "boot1", ["same", "same", "other"], 600.0, 0, b.now)
    assert {b.lease(1.0).token, b.lease(1.0).token} == {"same", "other"}
    assert b.ask(1.0) is None
    assert b.work(1) == pytest.approx(2.0)


def test_an_instance_without_tokens_is_not_chosen_and_the_others_are() -> None:
    b = bench()
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1), instance(2))), b.now)
    refills = {r.instance_id: r for r in b.balancer.refills(b.now)}
    b.balancer.add_tokens(refills[2], "boot1", [f"t{n}" for n in range(64)], 600.0, 0, b.now)
    b.balancer.refill_failed(refills[1], b.now)
    assert {b.lease(10.0).instance_id for _ in range(20)} == {2}


def test_a_failed_refill_is_repeated_after_a_pause_that_doubles() -> None:
    b = bench()
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1),)), b.now)
    pauses: list[float] = []
    last = b.now
    while len(pauses) < 5:
        for refill in b.balancer.refills(b.now):
            pauses.append(round(b.now - last, 2))
            last = b.now
            b.balancer.refill_failed(refill, b.now)
        b.now += 0.01
    assert pauses == pytest.approx([0.0, 0.25, 0.5, 1.0, 2.0], abs=0.03)


def test_only_one_refill_of_an_instance_is_under_way() -> None:
    b = bench()
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1),)), b.now)
    assert len(b.balancer.refills(b.now)) == 1
    b.tick(5.0)
    assert b.balancer.refills(b.now) == []


def test_the_stock_is_refilled_before_it_is_empty_and_grows_with_use() -> None:
    b = bench(instance(1, throughput=1e6))
    least = STOCK_LEAST
    for _ in range(4000):
        b.now += 0.005
        b.lease(1.0)
        b.refill()
        least = min(least, int(str(b.row(1)["tokens_in_stock"])))
    assert least >= 20
    assert int(str(b.row(1)["tokens_in_stock"])) > 500


def test_an_instance_that_is_not_used_any_more_gets_the_least_stock_again() -> None:
    b = bench(instance(1, throughput=1e6))
    for _ in range(4000):
        b.now += 0.005
        b.lease(1.0)
        b.refill()
    for _ in range(3):
        b.tick(430.0)
        b.refill()
    b.tick(500.0)
    assert sum(r.count for r in b.refill()) == STOCK_LEAST


def test_an_idle_instance_is_given_new_tokens_before_the_old_ones_are_too_old() -> None:
    b = bench(instance(1))
    for _ in range(2000):
        b.tick(1.0)
        b.refill()
        assert int(str(b.row(1)["tokens_in_stock"])) > 0
    assert b.lease()


def test_tokens_are_not_leased_near_the_end_of_their_life() -> None:
    b = bench(instance(1))
    b.tick(0.79 * 600.0)
    assert b.lease()
    b.tick(0.02 * 600.0)
    assert b.ask() is None


@pytest.mark.parametrize(("tokens", "expires_in_s"), [([], 600.0), (["t1"], 0.0), (["t1"], -5.0)])
def test_a_batch_that_is_of_no_use_counts_as_a_failed_refill(tokens: list[str], expires_in_s: float) -> None:
    b = bench()
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1),)), b.now)
    (refill,) = b.balancer.refills(b.now)
    b.balancer.add_tokens(refill, "boot1", tokens, expires_in_s, 0, b.now)
    assert b.balancer.refills(b.now) == []
    assert b.row(1)["failures"] == 1


def test_a_thousand_instances_that_run_low_together_are_not_refilled_together() -> None:
    b = bench(*(instance(i) for i in range(1, 201)))
    for _ in range(200 * 40):
        b.lease(1.0)
    assert len(b.balancer.refills(b.now)) <= lb.REFILL_LOW


def test_a_reboot_takes_tokens_and_requests_with_it() -> None:
    b = bench(instance(1))
    b.lease(700.0)
    b.report(1, boot_id="boot2")
    assert b.row(1)["unfinished"] == 0
    assert b.ask() is None
    b.boots[1] = "boot2"
    b.refill()
    assert b.lease()


def test_a_reboot_seen_in_a_token_batch_is_one_too() -> None:
    b = bench(instance(1))
    old = [b.lease(1.0) for _ in range(STOCK_LEAST // 2 + 8)]  # enough that tokens are fetched again
    b.boots[1] = "boot2"
    b.refill()
    assert b.row(1)["unfinished"] == 0
    assert b.lease().token not in {x.token for x in old}
    assert b.balancer.ends == {"lost": len(old)}


def test_tokens_for_an_instance_that_has_left_are_dropped() -> None:
    b = bench()
    b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, (instance(1),)), b.now)
    (refill,) = b.balancer.refills(b.now)
    b.balancer.replace_hot(HotSet("epoch1", 2, "m", 0.1, 200.0, None, ()), b.now)
    b.balancer.add_tokens(refill, "boot1", ["t1"], 600.0, 0, b.now)
    b.balancer.refill_failed(refill, b.now)
    assert b.ask() is None


# -- expected work ---------------------------------------------------------------------------------------


def test_work_is_prompt_tokens_by_weight_and_the_expected_answer() -> None:
    b = bench(instance(1))
    assert b.balancer.work_of(1000, None) == pytest.approx(300.0)
    assert b.balancer.work_of(1000, 50) == pytest.approx(150.0)


def test_the_expected_answer_is_learned_from_completions_with_about_the_same_limit() -> None:
    b = bench(instance(1, throughput=1e6))
    for _ in range(400):
        lease = b.lease(b.balancer.work_of(0, 1000), max_tokens=1000)
        b.refill()
        b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, output_tokens=40),))
    assert b.balancer.expected_output(1000) == pytest.approx(42, abs=3)
    assert b.balancer.expected_output(100) <= 100.0


def test_requests_that_broke_off_teach_nothing_about_length() -> None:
    b = bench(instance(1, throughput=1e6))
    for _ in range(60):
        lease = b.lease(1.0, max_tokens=1000)
        b.refill()
        b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, "aborted", 1),))
    assert b.balancer.expected_output(1000) == 200.0


def test_a_length_is_learned_also_when_the_client_said_first_that_it_was_done() -> None:
    b = bench(instance(1))
    lease = b.lease(1.0, max_tokens=1000)
    b.balancer.done(lease.request_id, "finished", b.now)
    b.report(1, ended=(request_end(lease.request_id, output_tokens=900),))
    assert b.balancer.expected_output(1000) > 200.0


def test_an_expected_answer_never_exceeds_the_limit() -> None:
    b = bench(instance(1))
    lease = b.lease(1.0, max_tokens=15)
    b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, output_tokens=10_000),))
    assert b.balancer.expected_output(9) <= 9.0


# -- throughput ------------------------------------------------------------------------------------------


def rates(b: Bench, per_s: float, seconds: int = 200, **more: object) -> float:
    """The measured throughput after so many reports, one a second, of that rate."""
    total = 10_000.0
    for _ in range(seconds):
        b.now += 1.0
        total += per_s
        b.report(1, generation_tokens_total=round(total), **more)
    return float(str(b.row(1)["throughput_work_s"]))


def kept_full(b: Bench, per_s: float, seconds: int = 30, **more: Any) -> dict[str, Any]:
    """How it is described after so many reports, when it always has all the work that it may hold."""
    total = 10_000.0
    for _ in range(seconds):
        while b.ask(10.0):
            b.refill()
        b.now += 1.0
        total += per_s
        running = more.get("running", len(b.balancer._leases) - more.get("waiting", 0))
        started = tuple(b.balancer._leases)
        b.report(1, generation_tokens_total=round(total), started=started, **{**more, "running": running})
    return b.row(1)


def test_a_rate_above_the_estimate_raises_it() -> None:
    assert rates(bench(instance(1)), 170.0) == pytest.approx(170.0, rel=0.02)


def test_a_rate_that_is_high_for_a_moment_says_nothing_of_one_that_is_not_full() -> None:
    """Between two reports many answers may happen to go on and no prompt to be read."""
    b = bench(instance(1))
    total = 10_000.0
    for n in range(60):
        b.now += 1.0
        total += 250.0 if n % 5 == 0 else 50.0  # 90 on average
        b.report(1, generation_tokens_total=round(total))
    assert b.row(1)["throughput_work_s"] == 100.0


def test_a_rate_below_the_estimate_says_nothing_when_there_was_little_to_do() -> None:
    assert rates(bench(instance(1)), 20.0, running=1) == 100.0


def test_a_rate_below_the_estimate_lowers_it_when_requests_were_waiting() -> None:
    assert rates(bench(instance(1)), 60.0, running=5, waiting=2) == pytest.approx(60.0, rel=0.02)


def test_a_rate_below_the_estimate_lowers_it_when_it_had_all_it_can_hold() -> None:
    b = bench(instance(1))
    assert kept_full(b, 60.0)["throughput_work_s"] == pytest.approx(60.0, rel=0.05)


def test_leases_that_no_client_uses_do_not_make_an_instance_look_slow() -> None:
    b = bench(instance(1), lease_s=600.0)
    b.lease(980.0)
    assert rates(b, 0.0, running=0) == 100.0


def test_prompt_tokens_count_by_their_weight() -> None:
    b = bench(instance(1))
    for n in range(200):
        b.now += 1.0
        b.report(1, prompt_tokens_total=2000 * n)
    assert float(str(b.row(1)["throughput_work_s"])) == pytest.approx(200.0, rel=0.02)


def test_a_counter_that_starts_again_is_no_rate() -> None:
    b = bench(instance(1))
    b.report(1, generation_tokens_total=1_000_000)
    b.now += 1.0
    b.report(1, generation_tokens_total=0, waiting=3, running=3)
    b.now += 1.0
    b.report(1, generation_tokens_total=100, waiting=3, running=3)
    assert b.row(1)["throughput_work_s"] == 100.0


def test_no_counter_takes_the_throughput_beyond_eight_times_what_was_told() -> None:
    assert rates(bench(instance(1)), 1e6) == 800.0


# -- how much an instance may hold -----------------------------------------------------------------------


def test_a_rate_says_nothing_of_how_much_an_instance_may_hold() -> None:
    b = bench(instance(1))
    rates(b, 200.0)
    assert b.row(1)["capacity_work"] == 1000.0


def test_an_instance_in_which_requests_wait_may_hold_less() -> None:
    b = bench(instance(1))
    rates(b, 100.0, seconds=5, running=8, waiting=2)
    assert 600.0 < float(str(b.row(1)["capacity_work"])) < 1000.0
    rates(b, 100.0, seconds=60, running=8, waiting=2)
    assert b.row(1)["capacity_work"] == pytest.approx(1000.0 / lb.CAPACITY_RANGE, abs=0.1)


def test_a_few_that_wait_for_a_moment_are_not_too_many() -> None:
    b = bench(instance(1))
    rates(b, 100.0, running=8, waiting=1)
    for n in range(20):
        rates(b, 100.0, seconds=1, running=8, waiting=4 * (n % 2))
    assert float(str(b.row(1)["capacity_work"])) >= 1000.0


def test_an_instance_that_is_full_and_well_may_hold_more() -> None:
    """20 requests of 10 tokens a second each: the objective is a tenth of a second, and 0.08 are near it."""
    assert kept_full(bench(instance(1)), 4000.0)["capacity_work"] > 1500.0
    most = kept_full(bench(instance(1)), 1e6, seconds=100)["capacity_work"]
    assert most == pytest.approx(1000.0 * lb.CAPACITY_RANGE, rel=0.01)


def test_an_instance_whose_tokens_come_too_slowly_may_hold_less() -> None:
    """100 requests want 1,000 tokens a second at the objective; they get 500."""
    assert kept_full(bench(instance(1)), 500.0, seconds=20)["capacity_work"] < 900.0


def test_an_instance_that_is_not_full_learns_nothing_about_how_much_it_may_hold() -> None:
    b = bench(instance(1))
    b.lease(500.0)
    rates(b, 500.0, running=1)
    assert b.row(1)["capacity_work"] == 1000.0


def test_a_hot_set_does_not_undo_what_was_measured_but_corrects_what_was_not() -> None:
    b = bench(instance(1), instance(2))
    rates(b, 200.0)
    b.hot(instance(1, throughput=120.0), instance(2, throughput=120.0))
    assert float(str(b.row(1)["throughput_work_s"])) == pytest.approx(200.0, rel=0.02)
    assert b.row(2)["throughput_work_s"] == 120.0


# -- those who wait --------------------------------------------------------------------------------------


def full(max_held: int = 100, **settings: Any) -> tuple[Bench, Lease]:
    """One instance, full, and the lease that fills it."""
    b = bench(instance(1), max_held=max_held, **settings)
    return b, b.lease(1000.0)


def hold(
    b: Bench, work: float = 100.0, wait_s: float = 900.0, avoid: tuple[int, ...] = (), prompt_tokens: int = 0
) -> Waiter:
    """Somebody waits."""
    waiter = b.balancer.hold(Ask(work, None, avoid, prompt_tokens), b.now + wait_s, b.now)
    assert waiter is not None
    return waiter


def served(b: Bench) -> list[Waiter]:
    """Who gets a lease now, in that order."""
    return [waiter for waiter, _ in b.balancer.grant(b.now)]


def test_those_who_wait_are_served_in_the_order_they_came() -> None:
    b, lease = full()
    waiters = [hold(b, 400.0) for _ in range(5)]
    assert b.balancer.grant(b.now) == []
    b.balancer.done(lease.request_id, "finished", b.now)
    assert [w for w, _ in b.balancer.grant(b.now)] == waiters[:2]
    assert b.balancer.line.held == 3


def test_nobody_who_asks_overtakes_somebody_who_waits_and_can_be_in_time() -> None:
    b, _ = full()
    hold(b, 600.0)
    b.now += 1.0  # room for 100 by the estimate, not for the 600 that came first
    assert served(b) == []
    assert b.ask(100.0) is None


def test_in_one_line_nobody_who_asks_overtakes_anybody_who_waits() -> None:
    b, _ = full(late_bound_s=None)
    hold(b, 600.0)
    b.now += 3.0  # in two lanes he would be late by now
    assert served(b) == []
    assert b.ask(100.0) is None


def test_time_alone_makes_room_for_those_who_wait() -> None:
    b, _ = full()
    waiter = hold(b, 300.0)
    b.now += 3.0
    assert [w for w, _ in b.balancer.grant(b.now)] == [waiter]


def test_who_waits_only_because_of_an_instance_he_avoids_lets_the_others_pass() -> None:
    b = bench(instance(1))
    picky = hold(b, avoid=(1,))
    assert b.lease()
    other = hold(b)
    assert [w for w, _ in b.balancer.grant(b.now)] == [other]
    b.hot(instance(1), instance(2))
    assert [(w, x.instance_id) for w, x in b.balancer.grant(b.now)] == [(picky, 2)]


def test_who_went_away_is_passed_over() -> None:
    b, lease = full()
    first, second = hold(b), hold(b)
    b.balancer.cancel(first)
    b.balancer.cancel(first)
    assert b.balancer.line.held == 1
    b.balancer.done(lease.request_id, "finished", b.now)
    assert [w for w, _ in b.balancer.grant(b.now)] == [second]


def test_who_has_waited_long_enough_is_not_served_any_more() -> None:
    b, lease = full()
    hold(b, wait_s=5.0)
    b.now += 6.0
    b.balancer.done(lease.request_id, "finished", b.now)
    assert b.balancer.grant(b.now) == []
    assert (b.balancer.line.held, b.balancer.line.work) == (0, 0.0)


def test_the_line_is_bounded() -> None:
    b, _ = full(max_held=2)
    hold(b)
    hold(b)
    assert b.balancer.hold(Ask(1.0), b.now + 10.0, b.now) is None


def test_those_who_wait_for_a_fleet_of_none_are_served_when_the_first_is_hot() -> None:
    b = bench()
    waiters = [hold(b) for _ in range(3)]
    assert b.balancer.grant(b.now) == []
    b.hot(instance(1))
    assert [w for w, _ in b.balancer.grant(b.now)] == waiters


def test_a_replaced_hot_set_loses_nobody_who_waits() -> None:
    b, _ = full(max_held=500)
    waiters = [hold(b, 10.0) for _ in range(500)]
    served: list[Waiter] = []
    for n in range(2, 12):
        b.hot(*(instance(i) for i in range(n, n + 3)))
        served += [w for w, _ in b.balancer.grant(b.now)]
        b.refill()
    while granted := b.balancer.grant(b.now):
        served += [w for w, _ in granted]
        b.refill()
        b.now += 1.0
    assert served == waiters


# -- the late lane ---------------------------------------------------------------------------------------


def lanes(b: Bench) -> tuple[int, int]:
    """How many wait who can be in time, and how many who cannot."""
    return b.balancer.line.held - b.balancer.line.late, b.balancer.line.late


def test_who_cannot_be_in_time_by_the_work_ahead_is_late_at_once() -> None:
    """100 work/s, two seconds: the third comes behind 2.5 s of work."""
    b, _ = full()
    first, second, third = hold(b, 150.0), hold(b, 100.0), hold(b, 1.0)
    assert [first.late, second.late, third.late] == [False, False, True]
    assert lanes(b) == (2, 1)


def test_work_of_the_late_is_not_ahead_of_who_comes_next() -> None:
    b, _ = full()
    hold(b, 210.0)
    assert hold(b, 5000.0).late
    b.balancer.cancel(next(w for w in b.balancer.line._in_time if not w.over))
    assert not hold(b, 1.0).late


def test_who_came_in_time_and_was_not_served_in_time_is_late_then() -> None:
    b, lease = full()
    waiter = hold(b, 900.0)
    assert not waiter.late
    b.now += 2.1
    assert served(b) == []
    assert waiter.late
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [waiter]
    assert b.balancer.line.turned_late == 1


def test_a_long_prompt_may_wait_longer_but_for_what_reading_it_takes() -> None:
    """4,000 tokens: 2 s + 4 s, less 400 work at 100 work/s."""
    b, _ = full()
    assert hold(b, 500.0, prompt_tokens=4000).give_by - b.now == pytest.approx(2.0)
    b.hot(instance(1, throughput=400.0))
    b.balancer._set_throughput(b.balancer._instances[1], 400.0, b.now)
    b.balancer._survey()
    assert hold(b, 500.0, prompt_tokens=4000).give_by - b.now == pytest.approx(5.0)


def test_the_objective_says_what_late_is() -> None:
    b, _ = full(slo=Slo(first_token_s=10.0, prompt_token_s=0.0))
    hold(b, 900.0)
    assert not hold(b, 150.0).late
    assert hold(b, 1.0).late


def test_with_nothing_hot_who_would_be_late_is_known_by_when_something_will_be() -> None:
    b = bench()
    b.hot(expected_hot_s=60.0)
    assert hold(b).late
    b.now += 59.0
    assert not hold(b).late


def test_who_can_be_in_time_is_served_before_the_late() -> None:
    b, lease = full()
    early, late = hold(b, 300.0), hold(b, 300.0)
    b.now += 0.5
    b.balancer.cancel(early)
    in_time = hold(b, 300.0)
    assert (late.late, in_time.late) == (True, False)
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [in_time, late]


def test_the_late_get_what_the_others_leave() -> None:
    """With room for one, the late one waits on; with nobody in time, he gets it."""
    b, _ = full()
    hold(b, 210.0)
    late = hold(b, 100.0)
    b.now += 1.0
    assert served(b) == [], "who is in time does not fit, and so the late one must not either"
    b.now += 1.0
    assert served(b) == []
    b.now += 1.5  # now the first is late too, but he came first
    assert len(served(b)) == 2
    assert late.over


def test_who_asks_goes_before_the_late() -> None:
    b, _ = full()
    hold(b, 210.0)
    late = hold(b, 300.0)
    b.balancer.cancel(b.balancer.line._in_time[0])
    b.now += 2.0
    assert served(b) == []
    assert b.ask(200.0)
    assert not late.over


def test_who_has_been_waiting_for_longer_than_the_bound_goes_before_all_others() -> None:
    b, lease = full(late_bound_s=60.0, lease_s=600.0)
    hold(b, 210.0)
    overdue = hold(b, 800.0)
    b.balancer.cancel(b.balancer.line._in_time[0])
    b.now += 59.0
    assert served(b) == []
    in_time = hold(b, 400.0)
    b.now += 1.5
    assert b.ask(1.0) is None, "who asks must wait for him too"
    assert served(b) == []
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [overdue], "what he leaves is too little for the other"
    assert not in_time.over


def test_only_the_overdue_go_first_and_not_all_who_are_late() -> None:
    b, lease = full(late_bound_s=60.0, lease_s=600.0)
    hold(b, 210.0)
    overdue = hold(b, 100.0)
    b.balancer.cancel(b.balancer.line._in_time[0])
    b.now += 50.0
    hold(b, 210.0)
    late = hold(b, 100.0)
    b.balancer.cancel(b.balancer.line._in_time[-1])
    b.now += 11.0
    in_time = hold(b, 100.0)
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [overdue, in_time, late]


def test_the_late_are_served_in_the_order_they_came_whenever_they_turned_late() -> None:
    b, lease = full()
    patient = hold(b, 900.0, prompt_tokens=1000)  # 2 s + 1 s - 1 s
    b.now += 1.0
    at_once = hold(b, 1.0)
    assert (patient.late, at_once.late) == (False, True)
    b.now += 1.5
    assert served(b) == []
    assert (patient.late, lanes(b)) == (True, (0, 2))
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [patient, at_once]


def test_without_the_late_lane_nobody_is_late() -> None:
    b, lease = full(late_bound_s=None)
    waiters = [hold(b, 400.0) for _ in range(4)]
    b.now += 300.0
    assert served(b) == waiters[:1]
    b.balancer.done(lease.request_id, "finished", b.now)
    served(b)
    assert b.balancer.line.late == 0
    assert b.balancer.line.turned_late == 2, "who was given too late is counted all the same"
    assert not any(w.late for w in waiters)


@pytest.mark.parametrize("late", [False, True])
def test_who_goes_away_leaves_his_lane(*, late: bool) -> None:
    b, lease = full()
    gone = hold(b, 50.0 if not late else 210.0, prompt_tokens=7)
    if late:
        gone = hold(b, 50.0, prompt_tokens=7)
        b.balancer.cancel(b.balancer.line._in_time[0])
    assert gone.late is late
    stays = hold(b, 60.0)
    b.balancer.cancel(gone)
    b.balancer.cancel(gone)
    assert (b.balancer.line.held, b.balancer.line.work, b.balancer.line.prompt_tokens) == (1, 60.0, 0)
    assert b.balancer.line.late == 0
    assert b.balancer.line.work_ahead == 60.0
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [stays]


@pytest.mark.parametrize("late", [False, True])
def test_who_is_late_and_waits_too_long_is_not_served_any_more(*, late: bool) -> None:
    b, lease = full()
    if late:
        hold(b, 210.0, wait_s=5.0)
    assert hold(b, 10.0, wait_s=5.0).late is late
    b.now += 6.0
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == []
    assert lanes(b) == (0, 0)


def test_a_late_one_who_waits_only_because_of_an_instance_he_avoids_lets_the_others_pass() -> None:
    b, lease = full()
    hold(b, 210.0)
    picky, late = hold(b, 10.0, avoid=(1,)), hold(b, 10.0)
    b.balancer.cancel(b.balancer.line._in_time[0])
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == [late]
    b.hot(instance(1), instance(2))
    assert served(b) == [picky]


def test_an_overdue_one_who_avoids_all_there_is_keeps_nobody_from_being_served() -> None:
    b, lease = full(late_bound_s=60.0, lease_s=600.0)
    hold(b, 210.0)
    picky = hold(b, 10.0, avoid=(1,))
    b.balancer.cancel(b.balancer.line._in_time[0])
    b.now += 61.0
    assert b.ask(10.0) is None, "there is no room for either"
    b.balancer.done(lease.request_id, "finished", b.now)
    assert served(b) == []
    assert b.ask(10.0)
    assert not picky.over


def test_the_autoscaler_is_told_who_waits_how_long_and_what_has_arrived() -> None:
    b, _ = full()
    b.balancer.arrived(Ask(150.0, None, (), 500))
    hold(b, 210.0, prompt_tokens=500)
    b.now += 1.0
    hold(b, 10.0, prompt_tokens=20)
    usage = b.balancer.usage(b.now)
    assert (usage.held, usage.late, usage.in_flight) == (2, 1, 1)
    assert (usage.held_work, usage.held_prompt_tokens, usage.oldest_wait_s) == (220.0, 520, 1.0)
    assert (usage.arrivals, usage.arrived_prompt_tokens) == (2, 500)
    assert usage.arrived_output_tokens == pytest.approx(1000.0 + 100.0)
    b.balancer.cancel(b.balancer.line._in_time[0])
    assert b.balancer.usage(b.now).oldest_wait_s == 0.0


# -- what an instance has to read ------------------------------------------------------------------------


def test_an_instance_with_a_second_of_prompts_to_read_is_given_no_other() -> None:
    """At 100 work/s 1,000 tokens are read in a second: who came behind two of them would wait for both."""
    b = bench(instance(1, hold_s=100.0))
    assert b.lease(110.0, prompt_tokens=1000)
    assert b.lease(110.0, prompt_tokens=1000), "a second is not more than a second"
    assert b.ask(20.0, prompt_tokens=10) is None
    b.now += 1.0
    assert b.lease(20.0, prompt_tokens=10)


def test_prompts_are_spread_over_the_instances_before_any_has_too_much_to_read() -> None:
    b = bench(*(instance(i, hold_s=100.0) for i in range(1, 5)))
    assert Counter(b.lease(300.0, prompt_tokens=2500).instance_id for _ in range(4)) == Counter(range(1, 5))
    assert b.ask(1.0) is None


def test_an_idle_instance_is_given_a_prompt_of_any_length() -> None:
    b = bench(instance(1, hold_s=1000.0))
    b.lease(10_000.0, prompt_tokens=100_000)
    assert b.ask(1.0) is None


def test_an_instance_without_requests_has_nothing_to_read() -> None:
    """Its client did not use the lease, or it was booted: the next ones need not wait for that prompt."""
    b = bench(instance(1, hold_s=1000.0))
    lease = b.lease(10_000.0, prompt_tokens=100_000)
    b.balancer.done(lease.request_id, "unused", b.now)
    assert b.lease(10.0)
    assert b.lease(10.0)


def test_room_that_appears_because_prompts_have_been_read_is_given_to_who_waits() -> None:
    b = bench(instance(1, hold_s=100.0))
    b.lease(250.0, prompt_tokens=2500)
    waiter = hold(b, 10.0)
    assert served(b) == []
    b.now += 1.5
    assert served(b) == [waiter]


@pytest.mark.parametrize("late_bound_s", [None, 300.0])
def test_prompts_are_paced_so_that_answers_flow_but_not_for_who_is_late_in_one_line(
    late_bound_s: float | None,
) -> None:
    """Forty answers are being made; with a lane of their own the late leave those their pace."""

    def given(first_token_s: float) -> int:
        slo = Slo(first_token_s, 0.0, 0.1)
        b = bench(slo=slo, late_bound_s=late_bound_s)
        b.hot(instance(1, 1000.0, 1e3, timing=TIMINGS["13B", "awq4", "L40S", 1]))
        for _ in range(40):
            assert b.lease(500.0, prompt_tokens=10)
            b.now += 0.1
        for _ in range(20):
            ask = Ask(300.0, prompt_tokens=1500)
            b.balancer.arrived(ask)
            if b.balancer.route(ask, b.now) is None:
                assert b.balancer.hold(ask, b.now + 100.0, b.now)
        count = 0
        for _ in range(40):
            b.now += 0.1
            count += len(b.balancer.grant(b.now))
        return count

    paced, hurried = given(1000.0), given(0.01)
    assert hurried > 1.2 * paced if late_bound_s is None else hurried == paced


# -- the hot set -----------------------------------------------------------------------------------------


def test_an_older_version_of_the_hot_set_is_ignored() -> None:
    b = bench(instance(1))
    b.hot(instance(1), instance(2))
    assert not b.balancer.replace_hot(HotSet("epoch1", 1, "m", 0.1, 200.0, None, ()), b.now)
    assert b.balancer.hot == 2


def test_a_restarted_autoscaler_is_believed_and_its_predecessor_no_more() -> None:
    b = bench(instance(1))
    assert b.balancer.replace_hot(HotSet("epoch2", 1, "m", 0.1, 200.0, None, (instance(2),)), b.now)
    assert not b.balancer.replace_hot(HotSet("epoch1", 99, "m", 0.1, 200.0, None, ()), b.now)
    assert b.balancer.hot == 1


def test_what_stays_in_the_hot_set_keeps_tokens_and_leases() -> None:
    b = bench(instance(1))
    b.lease(700.0)
    stock = b.row(1)["tokens_in_stock"]
    b.version += 1
    b.balancer.replace_hot(
        HotSet("epoch1", b.version, "m", 0.1, 200.0, None, (instance(1), instance(2))), b.now
    )
    assert (b.row(1)["tokens_in_stock"], b.row(1)["unfinished"]) == (stock, 1)


def test_a_draining_instance_keeps_its_leases_and_gets_none() -> None:
    b = bench(instance(1))
    lease = b.lease()
    b.hot(instance(1, draining=True))
    assert b.ask(1.0) is None
    assert b.balancer.hot == 0
    assert b.balancer.usage(b.now).instances[1].unfinished == 1
    b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id),))
    assert b.balancer.usage(b.now).instances[1].unfinished == 0


def test_an_instance_that_need_not_drain_after_all_serves_again() -> None:
    b = bench(instance(1, draining=True))
    assert b.ask() is None
    b.hot(instance(1))
    assert b.lease()


def test_an_instance_that_left_takes_its_leases_and_its_work_with_it() -> None:
    b = bench(instance(1), instance(2))
    leases = [b.lease(500.0), b.lease(500.0)]
    b.hot(instance(2))
    assert b.balancer.usage(b.now).instances.keys() == {2}
    assert [b.balancer.done(x.request_id, "finished", b.now) for x in leases].count(True) == 1
    assert b.lease().instance_id == 2


def test_an_instance_at_another_address_is_another_one() -> None:
    b = bench(instance(1))
    b.lease()
    moved = msgspec.structs.replace(
        instance(1), address="http://10.0.0.9:8000", auth_url="http://10.0.0.9:3000"
    )
    b.version += 1
    b.balancer.replace_hot(HotSet("epoch1", b.version, "m", 0.1, 200.0, None, (moved,)), b.now)
    assert (b.row(1)["tokens_in_stock"], b.row(1)["unfinished"]) == (0, 0)
    b.refill()
    assert b.lease().address == "http://10.0.0.9:8000"


# -- failures --------------------------------------------------------------------------------------------


def fail(b: Bench, times: int, id: int = 1) -> None:
    """That many clients say that their request to it failed."""
    for _ in range(times):
        lease = b.lease(1.0, avoid=tuple(i for i in (1, 2) if i != id))
        b.balancer.done(lease.request_id, "failed", b.now)


def test_an_instance_that_fails_three_times_in_a_row_is_avoided_until_it_reports_again() -> None:
    b = bench(instance(1), instance(2))
    fail(b, 3)
    assert {b.lease(1.0).instance_id for _ in range(10)} == {2}
    b.now += 1.5
    assert {b.lease(1.0).instance_id for _ in range(10)} == {2}
    b.report(1)
    assert 1 in {b.lease(1.0).instance_id for _ in range(10)}


def test_a_success_between_failures_is_a_new_beginning() -> None:
    b = bench(instance(1), instance(2))
    fail(b, 2)
    good = b.lease(1.0, avoid=(2,))
    b.balancer.done(good.request_id, "finished", b.now)
    fail(b, 2)
    assert b.lease(1.0, avoid=(2,))


def test_an_instance_that_fails_again_and_again_is_avoided_longer_each_time() -> None:
    b = bench(instance(1), instance(2))
    avoided = []
    for n in range(4):
        fail(b, 3 if n == 0 else 1)  # then one probe is enough
        since = b.now
        while b.row(1)["avoided"]:
            b.now += 0.25
            b.report(1)
            b.refill()
        avoided.append(b.now - since)
    assert avoided == pytest.approx([1.0, 2.0, 4.0, 8.0], abs=0.3)


def test_reports_that_do_not_come_count_as_failures() -> None:
    b = bench(instance(1), instance(2))
    for _ in range(3):
        b.balancer.poll_failed(b.poll(1), b.now)
    assert b.row(1)["avoided"]
    assert not b.row(2)["avoided"]


def test_a_model_server_that_is_down_counts_as_a_failure_although_the_report_came() -> None:
    b = bench(instance(1), instance(2))
    for _ in range(3):
        b.report(1, model_up=False)
    assert {b.lease(1.0).instance_id for _ in range(10)} == {2}


# -- polls -----------------------------------------------------------------------------------------------


def polled(b: Bench, seconds: float) -> Counter[int]:
    """How often each instance is asked in that time when each answers at once."""
    asked: Counter[int] = Counter()
    for _ in range(round(seconds / 0.02)):
        b.now += 0.02
        for poll in b.balancer.polls(b.now):
            asked[poll.instance_id] += 1
            running = len(b.balancer._instances[poll.instance_id].leases)
            b.balancer.report(poll, load_report(running=running), b.now)
    return asked


def test_a_working_instance_is_asked_every_second_and_an_idle_one_every_five() -> None:
    b = bench(instance(1), instance(2), lease_s=600.0)
    working = b.lease().instance_id
    asked = polled(b, 60.0)
    assert asked[working] == pytest.approx(55, abs=6)
    assert asked[3 - working] == pytest.approx(12, abs=2)


def test_however_many_work_there_are_no_more_than_200_reports_a_second() -> None:
    b = bench(*(instance(i) for i in range(1, 601)), lease_s=600.0)
    for _ in range(600):
        b.lease(800.0)
    asked = polled(b, 12.0)
    assert asked.total() <= 12 * 200
    assert len(asked) == 600


def test_nobody_is_asked_again_before_he_has_answered() -> None:
    b = bench(instance(1))
    b.lease()
    b.now += 5.0
    asked = [p for _ in range(50) for p in b.balancer.polls(b.now)]
    assert [p.instance_id for p in asked] == [1]


# -- what the autoscaler is told -------------------------------------------------------------------------


def test_busy_is_the_work_in_instances_worth_of_capacity() -> None:
    b = bench(instance(1), instance(2, throughput=300.0))
    b.lease(500.0, avoid=(2,))
    b.lease(1500.0, avoid=(1,))
    usage = b.balancer.usage(b.now)
    assert [usage.busy, usage.demand] == pytest.approx([1.0, 1.0])


def test_demand_has_no_cap_and_counts_who_waits_and_who_was_refused() -> None:
    b, _ = full()
    hold(b, 500.0)
    b.balancer.refuse(Ask(700.0), b.now)
    usage = b.balancer.usage(b.now)
    assert [usage.busy, usage.demand] == pytest.approx([1.0, 2.2])
    assert (usage.held, usage.held_work) == (1, 500.0)


def test_what_was_refused_is_demand_for_ten_seconds() -> None:
    b = bench()
    b.balancer.refuse(Ask(700.0), b.now)
    b.now += 9.0
    assert b.balancer.usage(b.now).demand > 0.0
    b.now += 3.0
    assert b.balancer.usage(b.now).demand == 0.0


def test_one_refused_request_is_demand_on_a_fleet_that_was_never_hot() -> None:
    b = bench()
    assert b.balancer.usage(b.now).demand == 0.0
    b.balancer.refuse(Ask(b.balancer.work_of(100, None)), b.now)
    assert 0.0 < b.balancer.usage(b.now).demand < 1.0


def test_busy_never_exceeds_the_hot_instances() -> None:
    b = bench(instance(1))
    b.lease(50_000.0)
    usage = b.balancer.usage(b.now)
    assert usage.busy == 1.0
    assert usage.demand == pytest.approx(50.0)


def test_working_seconds_are_those_with_a_request_under_way() -> None:
    b = bench(instance(1))
    b.now += 10.0
    lease = b.lease()
    b.now += 3.0
    assert b.balancer.usage(b.now).instances[1].working_s == pytest.approx(3.0)
    second = b.lease()
    b.balancer.done(lease.request_id, "finished", b.now)
    b.now += 2.0
    b.balancer.done(second.request_id, "finished", b.now)
    b.now += 10.0
    assert b.balancer.usage(b.now).instances[1].working_s == pytest.approx(5.0)


def test_arrivals_are_counted_whatever_becomes_of_them() -> None:
    b = bench(instance(1))
    b.ask(900.0)
    b.ask(900.0)
    usage = b.balancer.usage(b.now)
    assert (usage.arrivals, usage.arrived_work) == (2, 1800.0)


# -- when to ask again -----------------------------------------------------------------------------------


def test_with_nothing_hot_it_says_when_something_will_be() -> None:
    b = bench()
    b.hot(expected_hot_s=90.0)
    assert b.balancer.refuse(Ask(1.0), b.now) == ("nothing_hot", 90.0)
    b.now += 60.0
    assert b.balancer.refuse(Ask(1.0), b.now) == ("nothing_hot", 30.0)
    b.now += 60.0
    assert b.balancer.refuse(Ask(1.0), b.now) == ("nothing_hot", 1.0)


def test_with_nothing_hot_and_nothing_known_it_says_half_a_minute() -> None:
    assert bench().balancer.refuse(Ask(1.0), T0) == ("nothing_hot", 30.0)


def test_with_all_busy_it_says_when_there_is_room_by_the_estimate() -> None:
    b, _ = full()
    why, after_s = b.balancer.refuse(Ask(400.0), b.now)
    assert (why, round(after_s, 3)) == ("all_busy", 4.0)


def test_with_all_busy_those_who_wait_come_first() -> None:
    b, _ = full()
    hold(b, 600.0)
    why, after_s = b.balancer.refuse(Ask(400.0), b.now)
    assert (why, round(after_s, 3)) == ("all_busy", 10.0)


# -- all of it at once -----------------------------------------------------------------------------------


def check_books(b: Bench) -> None:
    """What is true after every call."""
    balancer = b.balancer
    seen: set[str] = set()
    for inst in balancer._instances.values():
        assert inst.given == pytest.approx(sum(x.work for x in inst.leases.values()), abs=1e-6)
        assert not seen & inst.leases.keys()
        seen |= inst.leases.keys()
        assert sorted(inst.belief.ids) == sorted([*inst.leases, *inst.strangers])
        total = inst.given + inst.foreign
        assert FLOOR * total - 1e-3 <= inst.work(b.now) <= total + 1e-3
        serves = bool(inst.stock.size and inst.circuit.left) and not inst.told.draining
        if inst.entry is not None:
            assert serves
            queue = balancer._queues[inst.cls]
            assert inst.entry in queue.draining or inst.entry in queue.steady
        else:
            assert not serves
    assert seen == balancer._leases.keys()
    assert balancer._working == sum(bool(i.leases) for i in balancer._instances.values())
    in_time = [w for w in balancer.line._in_time if not w.over and not w.late]
    late = [w for w in balancer.line._late if not w.over]
    waiting = in_time + late
    assert len({id(w) for w in waiting}) == len(waiting)
    assert all(w.late for w in late)
    assert (balancer.line.held, balancer.line.late) == (len(waiting), len(late))
    assert balancer.line.work == pytest.approx(sum(w.ask.work for w in waiting), abs=1e-6)
    assert balancer.line.prompt_tokens == sum(w.ask.prompt_tokens for w in waiting)
    assert balancer.line.work_ahead == pytest.approx(sum(w.ask.work for w in in_time), abs=1e-6)
    for lane in (in_time, late):
        assert [w.since for w in lane] == sorted(w.since for w in lane)
    oldest_s = b.now - min((w.since for w in waiting), default=b.now)
    assert balancer.usage(b.now).oldest_wait_s == pytest.approx(oldest_s)
    if balancer.line.late_bound_s is None:
        assert not late


@pytest.mark.parametrize("late_bound_s", [None, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_books_balance_whatever_happens(seed: int, late_bound_s: float | None) -> None:
    """Random life of a small fleet: no token twice, no work lost, capacity kept but for the idle rule."""
    rng = random.Random(seed)
    speed = {i: rng.choice([50.0, 100.0, 105.0, 400.0]) for i in range(1, 9)}
    b = bench(
        *(instance(i, speed[i]) for i in range(1, 5)),
        seed=seed,
        lease_s=20.0,
        max_held=10,
        late_bound_s=late_bound_s,
    )
    out: dict[str, Lease] = {}
    ever: set[tuple[int, str]] = set()
    returned: set[str] = set()
    boots: Counter[int] = Counter()

    def given(lease: Lease) -> None:
        inst = b.balancer._instances[lease.instance_id]
        assert inst.work(b.now) <= inst.capacity + 1e-3 or len(inst.leases) == 1
        assert (lease.instance_id, lease.token) not in ever or lease.token in returned
        ever.add((lease.instance_id, lease.token))
        returned.discard(lease.token)
        out[lease.request_id] = lease

    for _ in range(5000):
        b.now += rng.expovariate(5.0)
        step = rng.random()
        if step < 0.5:
            avoid = tuple(rng.sample(range(1, 9), rng.choice([0, 0, 0, 1, 3])))
            prompt_tokens = rng.choice([0, 0, 100, 3000])
            work = prompt_tokens * 0.1 + rng.choice([1.0, 30.0, 120.0, 900.0])
            ask = Ask(work, rng.choice([None, 10, 200]), avoid, prompt_tokens)
            lease = b.balancer.route(ask, b.now)
            if lease is not None:
                given(lease)
            elif rng.random() < 0.5:
                b.balancer.hold(ask, b.now + rng.uniform(0.1, 10.0), b.now)
            else:
                b.balancer.refuse(ask, b.now)
        elif step < 0.7 and out:
            lease = out.pop(rng.choice(sorted(out)))
            outcome = rng.choice(["finished", "finished", "failed", "unused"])
            started = lease.started
            boot = b.balancer._instances[lease.instance_id].boot_id if not lease.over else None
            if b.balancer.done(lease.request_id, outcome, b.now) and outcome == "unused" and not started:
                assert boot == lease.boot_id
                returned.add(lease.token)
        elif step < 0.9:
            for poll in b.balancer.polls(b.now):
                if rng.random() < 0.15:
                    b.balancer.poll_failed(poll, b.now)
                    continue
                mine = [x for x in out.values() if x.instance_id == poll.instance_id]
                ended = [x for x in mine if rng.random() < 0.4]
                if rng.random() < 0.02:
                    boots[poll.instance_id] += 1
                    b.boots[poll.instance_id] = f"boot{1 + boots[poll.instance_id]}"
                report = load_report(
                    boot_id=b.boots.get(poll.instance_id, "boot1"),
                    started=tuple(x.request_id for x in mine if rng.random() < 0.7),
                    ended=tuple(
                        request_end(x.request_id, rng.choice(["finished", "aborted"])) for x in ended
                    ),
                    running=rng.choice([0, max(0, len(mine) - len(ended)), len(mine) + 2]),
                    waiting=rng.choice([0, 0, 3]),
                    model_up=rng.random() < 0.95,
                    generation_tokens_total=rng.randrange(10_000_000),
                )
                b.balancer.report(poll, report, b.now)
        elif step < 0.94:
            chosen = rng.sample(range(1, 9), rng.randrange(0, 6))
            b.version += 1
            members = tuple(instance(i, speed[i], draining=rng.random() < 0.3) for i in sorted(chosen))
            b.balancer.replace_hot(HotSet("epoch1", b.version, "m", 0.1, 200.0, None, members), b.now)
        elif step < 0.97:
            for refill in b.balancer.refills(b.now):
                b.balancer.refill_failed(refill, b.now)
        else:
            b.balancer.tick(b.now)
        if rng.random() < 0.7:
            b.refill()
        for waiter, lease in b.balancer.grant(b.now):
            assert waiter.over
            given(lease)
        out = {k: x for k, x in out.items() if not x.over}
        check_books(b)
    assert b.balancer.routed > 1000
    assert b.balancer.line.turned_late > 0
    assert late_bound_s is not None or b.balancer.line.late == 0


def test_the_same_seed_makes_the_same_choices() -> None:
    def run(seed: int) -> list[int]:
        b = bench(*(instance(i) for i in range(1, 20)), seed=seed)
        return [b.lease(10.0).instance_id for _ in range(200)]

    assert run(3) == run(3)
    assert run(3) != run(4)
