"""What an owner asks of its instances."""

from tests.unit.localcloud.api.face import Face


def test_state_label_and_reboot_are_changed_by_put(face: Face) -> None:
    instance_id = face.rent()
    url = f"/api/v0/instances/{instance_id}/"
    assert face.ask("PUT", url, {"label": "b"}).get_json() == {"success": True}
    assert face.listing()["instances"][0]["label"] == "b"
    assert face.ask("PUT", url, {"state": "stopped"}).get_json() == {"success": True}
    assert face.listing()["instances"][0]["actual_status"] == "exited"
    assert face.ask("PUT", url, {"state": "running"}).get_json() == {"success": True}
    assert face.ask("PUT", url, {"state": "odd"}).status_code == 400
    assert face.ask("PUT", url, {}).status_code == 400
    assert face.ask("PUT", f"/api/v0/instances/reboot/{instance_id}/", {}).status_code == 400, (
        "it does not run"
    )
    assert (
        face.ask("PUT", "/api/v0/instances/5/", {"state": "running"}).get_json()["error"]
        == "no_such_instance"
    )
