"""A state directory that cannot be written is said in one line when the autoscaler starts."""

from pathlib import Path

import pytest

from fleet.outside.process import only_one
from process.errors import ConfigError


def test_a_lock_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    """A read-only disk was a traceback (found by `make chaos`); root can write everywhere but here."""
    with pytest.raises(ConfigError, match=r"autoscaler\.lock cannot be used: No such file or directory"):
        only_one(tmp_path / "gone" / "autoscaler.lock")
