"""Logs and commands, fetched in three steps."""

from tests.unit.localcloud.api.face import Face


def test_a_log_is_fetched_in_three_steps(face: Face) -> None:
    instance_id = face.rent()
    folder = face.world.root / "instances" / str(instance_id)
    folder.mkdir(parents=True)
    (folder / "console.log").write_text("one\ntwo x\nthree x\n")
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {"tail": "1", "filter": "x"})
    path = asked.get_json()["result_url"].removeprefix("http://localhost")
    assert face.client.get(path).status_code == 403, "it is being uploaded"
    face.now += 1.0
    reply = face.client.get(path)
    assert (reply.status_code, reply.text, reply.mimetype) == (200, "three x\n", "text/plain")


def test_the_daemons_log_tells_what_happened_to_it(face: Face) -> None:
    instance_id = face.rent()
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}", {"daemon_logs": "true"})
    face.now += 1.0
    assert "rented" in face.client.get(asked.get_json()["result_url"].removeprefix("http://localhost")).text


def test_only_three_commands_can_be_executed(face: Face) -> None:
    url = f"/api/v0/instances/command/{face.rent()}/"
    for command in ("cat /etc/passwd", "", "bash", "x" * 513, 5):
        assert face.ask("PUT", url, {"command": command}).status_code == 400


def test_a_log_is_never_uploaded(face: Face) -> None:
    instance_id = face.rent()
    face.fault("log-never", count=1)
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {})
    face.now += 3600.0
    assert face.client.get(asked.get_json()["result_url"].removeprefix("http://localhost")).status_code == 403
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {})
    face.now += 1.0
    assert face.client.get(asked.get_json()["result_url"].removeprefix("http://localhost")).status_code == 200
