"""The processors that instances get."""

import os

import pytest

from localcloud.processes import least_used_processor


def test_an_instance_gets_the_processor_that_fewest_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert least_used_processor([]) == 3
    assert least_used_processor([3]) == 5
    assert least_used_processor([3, 5]) == 3
    assert least_used_processor([5]) == 3, "only the second runs, on 5"
    assert least_used_processor([None, None, 3]) == 5, "an instance without one counts for none"
