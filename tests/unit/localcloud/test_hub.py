"""Gated, private and missing models and images: localcloud/hub.py, and what a rental gets of it."""

from typing import Any

import pytest

from localcloud.effects import Boot
from localcloud.faults import Faults
from localcloud.hub import HubAccess
from localcloud.phases import Phase
from remote.log_lines import cause_of_death
from tests.unit.localcloud.cloud_world import CloudWorld

MODEL = "meta/gated-13b"
ARGV = ("--model", MODEL, "--max-model-len", "4096")


def access(name: str, **args: str) -> HubAccess:
    faults = Faults()
    faults.add(name, args, 0.0)
    return HubAccess.by_faults(faults, (1, 1), 0.0)


@pytest.mark.parametrize(
    ("name", "args", "environ", "last", "status"),
    [
        ("gated-model", {}, {}, "must have access to it and be authenticated", 1),
        ("gated-model", {"token": "hf_right"}, {"HF_TOKEN": "hf_wrong"}, "not in the authorized list", 1),
        ("missing-model", {}, {"HF_TOKEN": "hf_right"}, "by passing `token=<your_token>`", 1),
        ("unknown-architecture", {}, {}, "are not supported for now", 1),
        ("wrong-argument", {"argument": "--max-model-len"}, {}, "unrecognized arguments: --max-model-len", 2),
    ],
)
def test_an_engine_dies_as_vllm_does_and_the_machine_knows_why(
    name: str, args: dict[str, str], environ: dict[str, str], last: str, status: int
) -> None:
    death = access(name, **args).death(MODEL, ARGV, environ)
    assert death is not None
    assert death.status == status
    assert last in death.lines[-1]
    why, lasts = cause_of_death("\n".join(death.lines).encode())
    assert lasts, "the supervisor does not try again"
    assert why


@pytest.mark.parametrize(
    ("name", "args", "environ"),
    [
        ("gated-model", {"token": "hf_right"}, {"HF_TOKEN": "hf_right"}),
        ("gated-model", {"model": "another/model"}, {}),
        ("gated-model", {}, {"HF_HUB_OFFLINE": "1"}),
        ("missing-model", {"model": "another/model"}, {}),
        ("wrong-argument", {"argument": "--dtype"}, {}),
        ("no-chat-template", {}, {}),
    ],
)
def test_an_engine_that_gets_all_it_wants_loads(
    name: str, args: dict[str, str], environ: dict[str, str]
) -> None:
    assert access(name, **args).death(MODEL, ARGV, environ) is None


def booted(world: CloudWorld) -> Boot:
    (boot,) = [e for e in world.effects if isinstance(e, Boot)]
    return boot


def test_a_container_gets_the_accounts_variables_as_they_were_when_it_was_made() -> None:
    w = CloudWorld()
    w.cloud.account.set_secret("HF_TOKEN", "hf_first")
    w.rent()
    w.cloud.account.set_secret("HF_TOKEN", "hf_second")
    w.after(200.0)
    assert booted(w).secrets == {"HF_TOKEN": "hf_first"}
    assert "hf_first" not in repr(booted(w))


def test_a_boot_is_told_what_the_hub_refuses() -> None:
    w = CloudWorld()
    w.faults.add("gated-model", {"token": "hf_right"}, 0.0)
    w.rent()
    w.after(200.0)
    assert booted(w).hub == HubAccess(gated="any", token="hf_right")


@pytest.mark.parametrize(
    ("name", "args", "login", "says"),
    [
        ("missing-image", {}, None, "manifest for a/b:v9 not found: manifest unknown"),
        ("missing-image", {"image": "other:1"}, None, None),
        ("private-image", {}, None, "pull access denied for a/b"),
        ("private-image", {"login": "-u a -p b"}, "-u a -p wrong", "pull access denied for a/b"),
        ("private-image", {"login": "-u a -p b"}, "-u a -p b", None),
    ],
)
def test_an_image_that_cannot_be_pulled_is_said_in_status_msg(
    name: str, args: dict[str, Any], login: str | None, says: str | None
) -> None:
    w = CloudWorld()
    w.faults.add(name, args, 0.0)
    rental = w.rent(image="a/b:v9", image_login=login)
    w.after(300.0)
    if says is None:
        assert w.phase(rental) is Phase.RUNNING
    else:
        assert w.phase(rental) is Phase.CREATED
        assert says in str(w.row(rental)["status_msg"])
    assert login is None or login not in repr(w.cloud.rentals[rental].order)
