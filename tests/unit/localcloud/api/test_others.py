"""Templates, automatic tags, updates and copies; and an error in the service's shape for all other calls."""

import json
import re
from pathlib import Path

import pytest
import vastai.api  # type: ignore[import-untyped]

from localcloud.phases import Phase
from localcloud.templates import TEMPLATES
from tests.unit.localcloud.api.face import OFFER, ORDER, Face

VLLM = TEMPLATES[0]


def calls_of_the_package() -> list[tuple[str, str]]:
    """Every call of the API that the vastai package can make, as (method, path) with 1 for what varies."""
    found = set()
    for file in Path(vastai.api.__path__[0]).glob("*.py"):
        for method, path in re.findall(
            r"client\.(get|put|post|delete)\(\s*f?\"(/[^\"]*)\"", file.read_text()
        ):
            whole = path if path.startswith("/api/") else f"/api/v0{path}"
            found.add((method.upper(), re.sub(r"\{[^}]*\}", "1", whole)))
    return sorted(found)


def test_every_call_of_the_package_is_answered_in_the_shape_of_the_service(face: Face) -> None:
    calls = calls_of_the_package()
    assert len(calls) > 100
    for method, path in calls:
        reply = face.ask(method, path, {})
        assert reply.mimetype == "application/json", (method, path, reply.text)
        if reply.status_code >= 400:
            said = reply.get_json()
            assert said["success"] is False, (method, path)
            assert isinstance(said["error"], str), (method, path)
            assert isinstance(said["msg"], str), (method, path)
            assert reply.status_code in (400, 404, 410), (method, path)


def test_an_unknown_call_needs_the_key_too(face: Face) -> None:
    assert face.ask("GET", "/api/v0/machines/1/", headers={}).status_code == 401
    assert face.ask("POST", "/api/v0/machines/1/").get_json()["error"] == "not_found"


def test_templates_are_found_by_their_fields(face: Face) -> None:
    filters = json.dumps({"name": {"eq": "vLLM"}, "count_created": {"gt": 10}})
    said = face.ask("GET", f"/api/v0/template/?select_cols=[%22*%22]&select_filters={filters}").get_json()
    assert (said["success"], [t["hash_id"] for t in said["templates"]]) == (True, [VLLM["hash_id"]])
    assert len(face.ask("GET", "/api/v0/template/").get_json()["templates"]) == len(TEMPLATES)
    assert face.ask("GET", "/api/v0/template/?select_filters=[]").status_code == 400


def test_a_template_gives_the_image_and_an_unknown_one_is_refused(face: Face) -> None:
    order = {**ORDER, "image": None, "template_hash_id": VLLM["hash_id"]}
    number = face.ask("PUT", f"/api/v0/asks/{OFFER}/", order).get_json()["new_contract"]
    assert face.cloud.rentals[number].order.image.startswith("vastai/vllm:")
    refused = face.ask("PUT", f"/api/v0/asks/{OFFER + 1}/", {**ORDER, "template_hash_id": "f00"})
    assert (refused.status_code, refused.get_json()["error"]) == (400, "invalid_args")
    assert len(face.cloud.rentals) == 1


def test_the_automatic_tag_is_chosen_by_the_hosts_driver(face: Face) -> None:
    number = face.rent(image="vastai/vllm:@vastai-automatic-tag")
    (row,) = face.listing()["instances"]
    assert (row["id"], row["image_uuid"]) == (number, "vastai/vllm:v0.11.0-cuda-12.8-mini-py312")


def run(face: Face, number: int) -> None:
    rental = face.cloud.rentals[number]
    while rental.phase is not Phase.RUNNING:
        face.now += 10.0
        face.cloud.advance(face.now)
        rental.booted(rental.boot, {}, face.now)
    face.cloud.take_effects()


def test_an_update_makes_the_container_anew_from_the_new_image(face: Face) -> None:
    number = face.rent()
    run(face, number)
    said = face.ask(
        "PUT", f"/api/v0/instances/update_template/{number}/", {"id": number, "image": "vllm/vllm-openai:y"}
    ).get_json()
    assert (said["success"], said["updated_instance"]["image_uuid"]) == (True, "vllm/vllm-openai:y")
    rental = face.cloud.rentals[number]
    assert (rental.phase, rental.pulled, rental.order.onstart) == (Phase.RECYCLING, False, "echo hi")
    wrongs: list[dict[str, object]] = [{"template_hash_id": "f00"}, {"image": 7}, {"env": []}]
    for wrong in wrongs:
        url = f"/api/v0/instances/update_template/{number}/"
        assert face.ask("PUT", url, wrong).status_code == 400
    assert face.ask("PUT", "/api/v0/instances/update_template/5/", {}).status_code == 404


def test_a_copy_goes_from_disk_to_disk_and_not_outside(face: Face) -> None:
    numbers = [face.rent(), face.rent(offer=OFFER + 1)]
    for number in numbers:
        run(face, number)
        (face.world.root / "instances" / str(number) / "home" / "data").mkdir(parents=True)
    source, target = (face.world.root / "instances" / str(n) / "home" for n in numbers)
    (source / "data" / "a").write_text("x")

    def copy(src_path: str, dst_path: str) -> int:
        body = {"src_id": f"C.{numbers[0]}", "dst_id": str(numbers[1])}
        body |= {"src_path": src_path, "dst_path": dst_path}
        return face.ask("PUT", "/api/v0/commands/copy_direct/", body).status_code

    assert copy("/data", "/there") == 200
    assert (target / "there" / "a").read_text() == "x"
    assert copy("/data/a", "/data") == 200
    assert (target / "data" / "a").read_text() == "x"
    assert copy("/../../../api.key", "/data") == 400
    assert copy("/nothing", "/data") == 400
    face.cloud.destroy(numbers[1], face.now)
    assert copy("/data/a", "/data") == 400


@pytest.mark.parametrize("path", ["/api/v0/commands/rsync/", "/api/v0/secrets/none/1"])
def test_what_it_does_not_do_is_said(face: Face, path: str) -> None:
    assert "the local cloud does not do this" in face.ask("PUT", path, {}).get_json()["msg"]
