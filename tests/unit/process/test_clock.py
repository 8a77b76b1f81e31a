"""The clock goes on evenly, whatever the machine's clock is set to."""

import time
from pathlib import Path

import pytest

from process.clock import StepDetector, boot_id, boot_time, steady_clock, wall_offset


def set_wall_clock(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + by_s)


@pytest.mark.parametrize("by_s", [-7200.0, 7200.0])
def test_a_second_process_goes_on_from_the_clock_of_the_first(
    monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    """Field fault C7: hours set forth or back between two processes became dollars."""
    offset = wall_offset()
    first = steady_clock(offset)()
    set_wall_clock(monkeypatch, by_s)
    assert 0.0 <= steady_clock(offset)() - first < 60.0
    assert abs(steady_clock()() - first - by_s) < 60.0


def test_time_goes_on_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLOCK_MONOTONIC stands still then, and rent does not."""
    clock, real = steady_clock(), time.clock_gettime
    before = clock()
    monkeypatch.setattr(
        time, "clock_gettime", lambda which: real(which) + (90.0 if which == time.CLOCK_BOOTTIME else 0.0)
    )
    assert 90.0 <= clock() - before < 100.0


def test_a_step_of_the_wall_clock_is_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = StepDetector()
    assert steps.step_s() == 0.0
    with monkeypatch.context() as patched:
        set_wall_clock(patched, 3600.0)
        assert steps.step_s() == pytest.approx(3600.0, abs=1.0)
        assert steps.step_s() == 0.0
    assert steps.step_s() == pytest.approx(-3600.0, abs=1.0)


def test_a_machine_without_a_boot_id_has_none(tmp_path: Path) -> None:
    assert boot_id(tmp_path / "nothing") is None
    (tmp_path / "id").write_text("abc\n")
    assert boot_id(tmp_path / "id") == "abc"
    assert boot_time() > 0.0
