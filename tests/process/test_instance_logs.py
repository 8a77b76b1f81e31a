"""Commands on an instance's disk, run as processes."""

from pathlib import Path

from localcloud.instance_logs import InstanceLogs
from tests.unit.localcloud.api.face import Face


def test_a_command_runs_on_the_disk_of_its_instance(tmp_path: Path) -> None:
    home = tmp_path / "7" / "home"
    home.mkdir(parents=True)
    (home / "mine").touch()
    logs = InstanceLogs(tmp_path, "/usr/bin:/bin", lambda: 0.0)
    assert logs.command(7, "ls") == "mine\n"
    assert logs.command(7, "rm mine") == ""
    assert not (home / "mine").exists()


def test_a_command_that_may_be_executed_is_answered_with_where_its_output_will_be(tmp_path: Path) -> None:
    face = Face(tmp_path)
    instance_id = face.rent()
    (face.world.root / "instances" / str(instance_id) / "home").mkdir(parents=True)
    asked = face.ask("PUT", f"/api/v0/instances/command/{instance_id}/", {"command": "ls"})
    assert asked.status_code == 200
    face.now += 1.0
    path = asked.get_json()["result_url"].removeprefix("http://localhost")
    assert face.client.get(path).status_code == 200
    face.world.stop()
