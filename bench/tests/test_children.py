"""Child processes of a benchmark: what they used, and that nothing is left of them."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from bench import children


def test_a_stat_line_is_read_whatever_the_process_is_called() -> None:
    """utime 70, stime 30, and 5 and 5 of children it has waited for, in ticks."""
    rest = "S 41 1 1 0 -1 4194560 1 2 3 4 70 30 5 5 20 0 3 0 100 1 1"
    parent, seconds = children.parse_stat(f"42 (a (b) c d) {rest}")
    assert parent == 41
    assert seconds == pytest.approx(110 / os.sysconf("SC_CLK_TCK"))


def test_a_tree_is_a_process_and_all_that_descend_from_it_and_nobody_else() -> None:
    parents = {2: 1, 3: 2, 4: 3, 5: 1, 6: 5}
    assert sorted(children.tree_of(parents, 2)) == [2, 3, 4]
    assert children.tree_of(parents, 6) == [6]


def test_the_work_of_a_child_counts_and_nothing_of_it_is_left_afterwards(tmp_path: Path) -> None:
    """Also what the child started, which it does not end itself."""
    command = ["sh", "-c", "sleep 60 & echo pid $!; i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; wait"]
    with children.child(command, tmp_path / "log", core=-1) as it:
        children.wait_for("it", it, lambda: it.log.read_text().startswith("pid "), 5.0)
        grandchild = int(it.log.read_text().split()[1])
        children.wait_for("its work", it, lambda: children.tree_cpu_s([it.pid]) > 0.02, 5.0)
        assert children.tree_cpu_s([it.pid]) <= children.tree_cpu_s([it.pid, os.getpid()])
    assert not Path(f"/proc/{it.pid}").exists()
    limit = time.monotonic() + 5.0
    while Path(f"/proc/{grandchild}").exists() and _is_alive(grandchild) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not _is_alive(grandchild)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_process_that_ends_before_it_answers_is_said_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        children.child(["sh", "-c", "echo no such model; exit 3"], tmp_path / "log", core=0) as it,
        pytest.raises(RuntimeError, match=r"x-router does not answer(?s:.*)no such model"),
    ):
        children.wait_for("x-router", it, lambda: False, 5.0)
