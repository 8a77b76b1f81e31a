"""A short seed of the campaign of faults, and that its audit sees what it must see."""

from collections import Counter
from pathlib import Path

import pytest

from bench.chaos.audit import Line, audit, missed
from bench.chaos.campaign import CampaignSettings, Figures, Size, chosen_kinds, run_seed
from bench.chaos.kinds import all_kinds
from bench.chaos.logs import LogFindings
from bench.chaos.stack import StackSettings
from bench.chaos.users import Seen, text_of
from localcloud.faults import FAULTS

SHORT = (
    "kill-autoscaler",
    "kill-loadbalancer-1",
    "stop-gateway-1",
    "packets-delayed",
    "cloud:list-500",
    "model-killed",
)


@pytest.mark.alone
@pytest.mark.timeout(280)
def test_a_short_seed_keeps_every_promise(tmp_path: Path) -> None:
    """7 s of faults; what depends on how busy this machine is (times, memory) is for `make chaos`."""
    stack = StackSettings(7, speedup=300.0, hot=2, total=2, max_instances=3)
    settings = CampaignSettings(
        7, 0.1, SHORT, storm_s=7.0, pause_s=0.8, rest_s=1.0, keep=tmp_path, stack=stack
    )
    figures = run_seed(settings)
    assert figures.faults.total() > 3
    assert figures.outcomes["patient"]["ok"] > 5
    assert figures.outcomes["default"]["ok"] > 5
    assert figures.uses > 10, "the machines' own record of requests was read"
    assert figures.ledger_usd == pytest.approx(figures.cloud_usd, rel=0.2), (
        "half a minute, and looks of a second"
    )
    timed = {"seconds from the last fault to the full fleet", "memory and handles at the end"}
    timed |= {"requests that fail with the openai package's default retries, the same"}
    timed |= {"longest processor time of a loadbalancer without yielding"}
    timed |= {"the ledger's dollars to the cloud's, seed by seed"}
    assert [line for line in missed(audit([figures])) if line.what not in timed] == []


def test_every_fault_of_the_cloud_and_of_ours_is_a_kind_and_strikes_in_one_of_five_seeds() -> None:
    kinds = all_kinds()
    assert {f"cloud:{name}" for name in FAULTS} <= set(kinds)
    struck: set[str] = set()
    for seed in range(5):
        struck |= {k.name for k in chosen_kinds(CampaignSettings(seed, 1.0))}
    assert struck == {name for name, kind in kinds.items() if "trial" not in kind.tags}


def good() -> Figures:
    """What a seed shows in which nothing was missed."""
    figures = Figures(1, first_full_s=20.0, full_after_s=[5.0], ledger_usd=1.0, cloud_usd=1.0, uses=100)
    figures.outcomes = {"default": Counter(ok=100), "patient": Counter(ok=100)}
    figures.begin = {"autoscaler": Size(1, 100.0, 30)}
    figures.end = {"autoscaler": Size(1, 101.0, 31)}
    return figures


def test_nothing_is_missed_where_nothing_went_wrong() -> None:
    assert missed(audit([good(), good()])) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"outcomes": {"default": Counter(ok=100), "patient": Counter(ok=999, failed=1)}}, "120 s"),
        ({"outcomes": {"default": Counter(ok=90, failed=10), "patient": Counter()}}, "default retries"),
        ({"outcomes": {"default": Counter(ok=97, cut=1), "patient": Counter()}}, "cut in silence"),
        ({"outcomes": {"default": Counter(ok=97, doubled=1), "patient": Counter()}}, "doubled"),
        ({"outcomes": {"default": Counter(ok=97, miscounted=1), "patient": Counter()}}, "counted wrongly"),
        ({"served_twice": 1}, "served twice"),
        ({"wronged": ["destroyed 1"]}, "that were well"),
        ({"over_instances_s": 0.5}, "max_instances"),
        ({"over_usd_s": 0.5}, "max_dollars"),
        ({"left_behind": ["instance 1"]}, "left"),
        ({"full_after_s": [5.0, 22.0]}, "full fleet"),
        ({"ledger_usd": 1.006}, "ledger"),
        ({"ledger_usd": 0.994}, "ledger"),
        ({"cloud_usd": 0.0}, "ledger"),
        ({"holds_s": {"loadbalancer-2": 0.11}}, "without yielding"),
        ({"end": {"autoscaler": Size(1, 106.0, 31)}}, "memory"),
        ({"end": {"autoscaler": Size(1, 101.0, 100)}}, "memory"),
        ({"logs": LogFindings(10, ["Traceback"], [])}, "tracebacks"),
        ({"logs": LogFindings(10, [], ["a prompt in x"])}, "secrets"),
        ({"errors": ["users ended"]}, "campaign itself"),
    ],
)
def test_the_audit_sees_it_in_one_seed_of_two(wrong: dict[str, object], what: str) -> None:
    figures = good()
    for name, value in wrong.items():
        setattr(figures, name, value)
    [line] = missed(audit([good(), figures]))
    assert isinstance(line, Line)
    assert what in line.what


@pytest.mark.parametrize(
    ("text", "reason", "tokens", "verdict"),
    [
        (text_of(5), "length", 5, "ok"),
        (text_of(4), "length", 5, "cut"),
        (text_of(5), None, 5, "cut"),
        ("", None, None, "cut"),
        (text_of(6), "length", 5, "doubled"),
        (text_of(5) + text_of(5), "length", 10, "doubled"),
        (text_of(5), "length", 4, "miscounted"),
        (text_of(5), "stop", 5, "miscounted"),
    ],
)
def test_a_user_sees_whether_an_answer_is_whole(
    text: str, reason: str | None, tokens: int | None, verdict: str
) -> None:
    seen = Seen(reason=reason, tokens=tokens)
    seen.add(text)
    assert seen.verdict(5) == verdict
