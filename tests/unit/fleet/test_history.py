"""The fleet over time: what is kept, what is written down, and how it is thinned for a picture."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet.history import NAMES, SAVED_EVERY_S, FleetSample, History, columns, joined
from fleet.outside.ledger import KEPT_S, PRUNE_EVERY_S, Ledger

SAMPLE = FleetSample(0.0, 2, 1, 1, 3, 0, 2, 6, 1.5, 1.2, 0, 0.0, 100, 1, 0.9)


def at(seconds: float, **other: float) -> FleetSample:
    return replace(SAMPLE, at_s=seconds, **other)  # type: ignore[arg-type]


def noted(*samples: FleetSample) -> History:
    found = History()
    for sample in samples:
        found.note(sample)
    return found


def test_every_turn_is_kept_and_one_in_fifteen_seconds_is_written_down() -> None:
    found = noted(*(at(5.0 * n) for n in range(10)))
    assert [s.at_s for s in found.since(12.0)] == [15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0]
    assert [s.at_s for s in found.take_unsaved()] == [0.0, 15.0, 30.0, 45.0]
    assert found.take_unsaved() == []
    assert found.latest is not None
    assert found.latest.at_s == 45.0


def test_what_could_not_be_written_is_written_the_next_time_in_order() -> None:
    found = noted(at(0.0), at(SAVED_EVERY_S))
    lost = found.take_unsaved()
    found.note(at(2 * SAVED_EVERY_S))
    found.put_back(lost)
    assert [s.at_s for s in found.take_unsaved()] == [0.0, SAVED_EVERY_S, 2 * SAVED_EVERY_S]


def test_load_offered_follows_as_fast_as_a_local_cloud_does() -> None:
    found = History(speedup=60.0)
    values = [found.offered(600.0 * max(0, t - 20), 600.0, float(t)) for t in range(0, 41)]
    assert values[20] == 0.0
    assert values[25] == pytest.approx(0.5)
    assert values[30] == values[40] == pytest.approx(1.0)


def test_neighbouring_samples_are_joined_as_a_picture_shows_them() -> None:
    one, other = at(10.0, hot=2, held=0), at(15.0, hot=4, held=7)
    both = joined([one, other])
    assert (both.at_s, both.hot, both.held) == (15.0, 3.0, 7.0)


def test_load_offered_is_what_arrives_and_not_what_waits() -> None:
    """900 work/s arrive at instances that do 600: one and a half, however much has piled up before."""
    found = History()
    values = [found.offered(1e6 + 900.0 * t, 600.0, float(t)) for t in range(0, 121, 5)]
    assert values[0] == 0.0  # nothing is known of what came before
    assert values[1:] == pytest.approx([1.5] * 24)
    assert found.offered(1e6 + 900.0 * 120, 600.0, 150.0) == pytest.approx(900.0 * 30 / 60 / 600)  # it ends
    assert found.offered(1e6 + 900.0 * 120, 600.0, 185.0) == 0.0
    assert found.offered(2e6, None, 190.0) == 0.0


def test_the_share_in_time_is_of_the_requests_of_the_window() -> None:
    found = noted(
        at(0.0, arrived=0, late=0), at(600.0, arrived=1000, late=500), at(1200.0, arrived=1100, late=501)
    )
    assert found.share_in_time(600.0, 1200.0) == pytest.approx(0.99)
    assert found.share_in_time(5.0, 1200.0) is None  # nothing arrived
    assert History().share_in_time(600.0, 0.0) is None


def test_a_short_wait_is_still_seen_in_a_thinned_picture() -> None:
    samples = [at(float(n), held=0, hot=2) for n in range(1000)]
    samples[417] = at(417.0, held=9, hot=4)
    drawn = columns(samples, 100)
    assert set(drawn) == set(NAMES)
    assert len(drawn["at_s"]) == 100
    assert max(filter(None, drawn["held"])) == 9.0
    assert max(filter(None, drawn["hot"])) == pytest.approx(2.2)  # the mean of ten
    assert drawn["at_s"] == sorted(filter(lambda s: s is not None, drawn["at_s"]))  # type: ignore[type-var]
    assert set(drawn["first_p50"]) == {None}  # no answer came
    assert columns([], 100) == {name: [] for name in NAMES}


def test_the_picture_survives_a_restart_and_is_pruned_like_arrivals(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_counts({}, (), 10.0, [at(0.0), at(10.0, held=7)])
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert again.samples(5.0, 20.0) == [at(10.0, held=7)]
    later = KEPT_S + PRUNE_EVERY_S + 5.0
    again.add_counts({}, (), later, [at(later)])
    assert [s.at_s for s in again.samples(0.0, 1e9)] == [later]
    again.close()
