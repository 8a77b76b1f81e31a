"""Percentiles: of a list as numpy's, of a stream within a bucket."""

import numpy as np
import pytest

from simulation.figures import Digest, spread


@pytest.mark.parametrize(
    ("values", "name", "found"),
    [
        ([5.0], "p99", 5.0),
        ([1.0, 2.0, 3.0, 4.0], "p50", 2.5),
        ([0.0, 10.0], "p90", 9.0),
        ([1.0, 2.0, 3.0], "max", 3.0),
    ],
)
def test_a_percentile_is_interpolated(values: list[float], name: str, found: float) -> None:
    assert spread(values)[name] == pytest.approx(found)


def test_percentiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(1).lognormal(size=37).tolist()
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        assert spread(values)[name] == pytest.approx(float(np.quantile(values, share)))


def test_a_spread_of_nothing_is_null_everywhere() -> None:
    assert spread([]) == dict.fromkeys(("mean", "std", "p50", "p90", "p95", "p99", "max"))


def test_a_spread_is_of_the_values_in_any_order() -> None:
    assert spread([3.0, 1.0, 2.0]) == pytest.approx(
        {"mean": 2.0, "std": (2.0 / 3.0) ** 0.5, "p50": 2.0, "p90": 2.8, "p95": 2.9, "p99": 2.98, "max": 3.0}
    )


def test_a_digest_reads_percentiles_nearly_as_all_values_would_give_them() -> None:
    values = [0.001 * 1.003**n for n in range(4000)]
    counted, exact = Digest(values).spread(), spread(values)
    for name, value in exact.items():
        assert counted[name] == pytest.approx(value, rel=0.006)
    assert Digest().spread() == spread([])
    assert Digest([0.0, 0.0]).percentile(0.5) == 0.0
    with pytest.raises(ValueError, match="no value"):
        Digest().percentile(0.5)
