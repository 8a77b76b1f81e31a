"""The account: keys and dollars."""

from tests.unit.localcloud.api.face import Face


def test_the_account_knows_its_keys_and_dollars(face: Face) -> None:
    key = "ssh-ed25519 AAAA me"
    assert face.ask("POST", "/api/v0/ssh/", {"ssh_key": key}).get_json()["success"] is True
    assert [k["public_key"] for k in face.ask("GET", "/api/v0/ssh/").get_json()] == [key]
    assert face.ask("GET", "/api/v0/users/current").get_json()["credit"] == 100.0
    assert face.ask("POST", "/api/v0/ssh/", {"ssh_key": "no-key"}).status_code == 400


def test_the_credit_shown_is_that_of_now(face: Face) -> None:
    face.rent()
    face.now += 3600.0
    assert face.ask("GET", "/api/v0/users/current").get_json()["credit"] < 100.0
