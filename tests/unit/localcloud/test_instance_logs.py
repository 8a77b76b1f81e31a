"""What can be seen of an instance without ssh. Commands that run: tests/process/test_instance_logs.py."""

from pathlib import Path

import pytest

from localcloud.instance_logs import UPLOADS, InstanceLogs


@pytest.mark.parametrize("path", ["{outside}", "../../kept", "link", "-- ../../kept"])
def test_a_command_reaches_no_file_but_those_of_its_instance(tmp_path: Path, path: str) -> None:
    home = tmp_path / "7" / "home"
    home.mkdir(parents=True)
    kept = tmp_path / "kept"
    kept.mkdir()
    (home / "link").symlink_to(kept)
    path = path.format(outside=kept)
    said = InstanceLogs(tmp_path, "/bin", lambda: 0.0).command(7, f"rm -rf {path}")
    assert "not on this instance's disk" in said
    assert kept.exists()


def test_a_text_is_there_when_it_is_uploaded_and_the_oldest_is_forgotten() -> None:
    now = 0.0
    logs = InstanceLogs(Path("/nowhere"), "/bin", lambda: now)
    for n in range(UPLOADS + 1):
        logs.upload(str(n), f"text {n}", ready_at=1.0)
    assert logs.uploaded("1") is None, "it is being uploaded"
    now = 1.0
    assert logs.uploaded("1") == "text 1"
    assert logs.uploaded("0") is None, "there are too many"
