"""Which machines an operator wants: asked of the cloud, and held against what it answers."""

from dataclasses import replace

import pytest

from autoscaler import InstanceSet
from engine.profiles import get_profile
from fleet.commands import Create
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.limits import Limits
from fleet.outside.config import AutoscalerConfig
from fleet.preferences import Preferences
from fleet.regions import REGIONS, countries_of, country_of
from policies import Fixed
from process.errors import ConfigError
from tests.fleet_world import make_offer

PROFILE = get_profile("vllm-13")
OFFER = replace(make_offer(1, 0.4), host_id=7, verified=True, datacenter=True, num_gpus=2)


@pytest.mark.parametrize(
    ("preferences", "offer", "why"),
    [
        (Preferences(countries=frozenset({"NO"})), replace(OFFER, geolocation="Texas, US"), "regions"),
        (Preferences(countries=frozenset({"NO"})), replace(OFFER, geolocation=None), "regions"),
        (Preferences(datacenter_only=True), replace(OFFER, datacenter=False), "datacenter"),
        (Preferences(), replace(OFFER, verified=False), "verified"),
        (Preferences(hosts=frozenset({7})), replace(OFFER, host_id=8), "pinned"),
        (Preferences(hosts=frozenset({7})), replace(OFFER, host_id=None), "pinned"),
        (Preferences(avoided_hosts=frozenset({8})), replace(OFFER, host_id=8), "avoided"),
        (Preferences(max_usd_gpu_h=0.2), replace(OFFER, dph_total=0.41), "a GPU"),
        (Preferences(max_usd_million_tokens=0.3), replace(OFFER, dph_total=1.0), "million tokens"),
    ],
)
def test_an_offer_that_is_not_wanted_is_refused(preferences: Preferences, offer, why: str) -> None:  # type: ignore[no-untyped-def]
    def said(one) -> str | None:  # type: ignore[no-untyped-def]
        return preferences.refusal(one, one.dph_total * 0.5)

    assert said(OFFER) is None
    assert why in (said(offer) or "")


def test_the_cloud_is_asked_for_what_its_language_can_say() -> None:
    assert Preferences().query() == ""
    wanted = Preferences(
        countries=frozenset({"SE", "NO"}),
        datacenter_only=True,
        verified_only=False,
        hosts=frozenset({9, 7}),
        avoided_hosts=frozenset({3}),
    )
    assert wanted.query() == (
        "geolocation in [NO,SE] datacenter=true verified=any host_id in [7,9] host_id notin [3]"
    )


def test_regions_are_countries_and_groups_of_them() -> None:
    assert countries_of(["eu"]) == REGIONS["EU"]
    assert len(REGIONS["EU"]) == 27
    assert countries_of(["us", "EEA"]) == REGIONS["EEA"] | {"US"}
    assert country_of("Texas, US") == country_of("US") == "US"
    assert country_of("somewhere") is None
    for wrong in (["Sweden"], [""], ["U1"]):
        with pytest.raises(ConfigError, match="two letters"):
            countries_of(wrong)


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--region"):
        AutoscalerConfig(region=("Atlantis",)).checked()
    with pytest.raises(ConfigError, match="--pin-host and --avoid-host 5"):
        AutoscalerConfig(pin_host=(5, 6), avoid_host=(5,)).checked()
    assert AutoscalerConfig().checked().preferences == Preferences()


def _ordered(total: int, offers, preferences: Preferences) -> tuple[list[int], tuple[str, ...]]:  # type: ignore[no-untyped-def]
    """Return the hosts on which a first decision rents `total` instances, and its notes."""
    fleet = InstanceSet(
        "fleet", PROFILE, Limits(20, 100.0, 20), Deadlines.for_profile(PROFILE), preferences=preferences
    )
    fleet.observe([], (), 0.0)
    fleet.market.end_search(offers, 0.0)
    decision = fleet.decide(Demand("test", no_balancers=True), Fixed(0, total), 1.0)
    return [c.offer.host_id or 0 for c in decision.commands if isinstance(c, Create)], decision.notes


def test_a_host_gets_a_third_of_the_fleet_at_most() -> None:
    """Both machines of a fleet of two were rented of one host, though others were hardly dearer."""
    offers = [replace(make_offer(n, 0.3 + n / 100), host_id=1 if n < 6 else n) for n in range(1, 9)]
    assert _ordered(2, offers, Preferences())[0] == [1, 6]
    assert sorted(_ordered(6, offers, Preferences())[0]) == [1, 1, 6, 7, 8]
    assert _ordered(3, offers, Preferences(max_per_host=0))[0] == [1, 1, 1]
    hosts, notes = _ordered(4, offers[:5], Preferences(max_per_host=2))
    assert hosts == [1, 1]
    only, why = _ordered(1, offers[:2], Preferences(hosts=frozenset({5})))
    assert not only
    assert why == ("no suitable offer on the market (2 not of a host that is pinned)",)
    assert not notes


def test_what_is_there_already_counts_for_its_host() -> None:
    fleet = InstanceSet(
        "fleet", PROFILE, Limits(20, 100.0, 20), Deadlines.for_profile(PROFILE), preferences=Preferences()
    )
    fleet.observe([], (), 0.0)
    fleet.begin(Create(replace(make_offer(1), host_id=1), "a test", label="fleet/a"), 0.0)
    fleet.market.end_search([replace(make_offer(2), host_id=1)], 0.0)
    decision = fleet.decide(Demand("test", no_balancers=True), Fixed(0, 2), 1.0)
    assert not decision.commands
    assert decision.notes == ("no suitable offer on the market (1 hosts have their share, 1 instances)",)
