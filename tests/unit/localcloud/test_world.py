"""The thread between the cloud and its instances."""

import os
import signal
from pathlib import Path
from random import Random

import pytest

from localcloud.cloud import Cloud
from localcloud.machines import MACHINES
from localcloud.phases import IllegalPhase
from localcloud.world import World
from tests.waiting import wait_for


def test_a_face_does_not_go_on_without_its_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Cloud):
        def advance(self, now: float) -> None:
            raise IllegalPhase("no way")

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append((pid, number)))
    world = World(Breaks(MACHINES, Random(1)), tmp_path / "cloud", "paced")
    world.start()
    wait_for("it asks its process to end", lambda: asked == [(os.getpid(), signal.SIGTERM)])
    world.stop()
    assert world.failed
