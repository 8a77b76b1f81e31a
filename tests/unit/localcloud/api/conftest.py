"""The face for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.localcloud.api.face import Face


@pytest.fixture
def face(tmp_path: Path) -> Iterator[Face]:
    face = Face(tmp_path)
    yield face
    face.world.stop()
