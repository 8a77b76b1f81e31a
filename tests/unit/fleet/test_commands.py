"""Commands that are sent: what each answer of the cloud means for the command."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.profiles import get_profile
from fleet.commands import AccountFault, Command, Create, Destroy, LookForOffers, Reply, Start, Stop
from fleet.outside.performer import Performer, refusal_of
from process.errors import CloudError
from tests.fleet_world import make_offer
from vast import cli
from vast.client import check_env
from vast.errors import ApiError, CloudTimeout, NoSuchInstance, OfferGone

CREATE = Create(make_offer(5), "wanted", label="fleet/abc")


class Cloud:
    """Answers every call by raising, or with an id; keeps what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[str, tuple[tuple[object, ...], dict[str, Any]]]] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            self.asked.append((name, (args, more)))
            if self.error is not None:
                raise self.error
            return [make_offer(1)] if name == "search_offers" else 1001

        return call


def performer(cloud: Cloud) -> Performer:
    return Performer(cloud, get_profile("vllm-13"), lambda label: f"master-of-{label}")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (None, Reply.DONE),
        (OfferGone("create: no_such_ask", 410, "no_such_ask"), Reply.REFUSED),
        (ApiError("create: 400", status=400, msg="bad"), Reply.REFUSED),
        (ApiError("create: 500", status=500, msg=""), Reply.UNKNOWN),
        (ApiError("create: 504", status=504, msg=""), Reply.UNKNOWN),
        (CloudTimeout("create: no answer"), Reply.UNKNOWN),
        (CloudError("whatever"), Reply.UNKNOWN),
    ],
)
def test_a_create_that_may_have_had_an_effect_is_unknown_and_never_refused(
    error: Exception | None, reply: Reply
) -> None:
    done = performer(Cloud(error)).perform(CREATE)
    assert done.reply is reply
    assert done.new_id == (1001 if error is None else None)
    assert done.offer_gone == isinstance(error, OfferGone)


class NoKeys(Cloud):
    """Rents, and cannot attach a key."""

    def attach_ssh_key(self, *args: object) -> None:
        self.asked.append(("attach_ssh_key", (args, {})))
        raise CloudTimeout("attach ssh: no answer")


@pytest.mark.parametrize("cloud", [Cloud(), NoKeys()])
def test_the_fleets_key_is_attached_to_a_new_instance_and_it_exists_without_that(cloud: Cloud) -> None:
    profile = get_profile("vllm-13")
    sender = Performer(cloud, profile, lambda _: "m", ssh_public_key="ssh-ed25519 AAAA fleet")  # type: ignore[arg-type]
    done = sender.perform(CREATE)
    assert (done.reply, done.new_id) == (Reply.DONE, 1001)
    created, attached = cloud.asked
    assert "-e FLEET_SSH_KEY=ssh-ed25519:AAAA " in str(created[1][1]["env"])
    assert attached == ("attach_ssh_key", ((1001, "ssh-ed25519 AAAA fleet"), {}))


def test_destroying_what_is_not_there_is_done() -> None:
    cloud = Cloud(NoSuchInstance("destroy: 404", 404, ""))
    assert performer(cloud).perform(Destroy("fleet/a", 7, "")).reply is Reply.DONE
    assert performer(cloud).perform(Stop("fleet/a", 7, "")).reply is Reply.REFUSED


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (Start("fleet/a", 7, ""), "start"),
        (Stop("fleet/a", 7, ""), "stop"),
        (Destroy("fleet/a", 7, ""), "destroy"),
    ],
)
def test_each_order_is_one_call_with_the_id(command: Command, call: str) -> None:
    cloud = Cloud()
    assert performer(cloud).perform(command).reply is Reply.DONE
    assert [(name, args) for name, (args, _) in cloud.asked] == [(call, (7,))]


def test_the_market_comes_back_as_offers() -> None:
    done = performer(Cloud()).perform(LookForOffers("more wanted"))
    assert done.offers == (make_offer(1),)


def test_the_master_token_never_travels_only_its_hash_in_the_start_script() -> None:
    """Not even the hash in --env, which stands in the process list (vast-contract 2.2)."""
    cloud = Cloud()
    performer(cloud).perform(CREATE)
    ((_, (args, more)),) = cloud.asked
    hashed = hashlib.sha256(b"master-of-fleet/abc").hexdigest()
    script = more.pop("onstart")
    assert hashed in script
    assert "master-of" not in script
    for secret in ("master-of", hashed):
        assert secret not in repr((args, more))
    check_env(more["env"])


@pytest.mark.parametrize(
    ("status", "msg", "refusal"),
    [
        (401, "Invalid user key", AccountFault.KEY),
        (401, "This action requires the permission instance_write", AccountFault.SCOPE),
        (403, "error 403/3600: no permission for this route", AccountFault.SCOPE),
        (403, "error 403/3586: Offer 1234567 is not your own", None),
        (400, "error 400/3470: insufficient credit", AccountFault.CREDIT),
        (400, "spend_rate_limit: new accounts may spend $1.00/h", AccountFault.SPEND_LIMIT),
        (404, "error 404/3500: template hash nothing not found", AccountFault.IMAGE),
        (400, "error 400/3467: Invalid args: image a/b not found", AccountFault.IMAGE),
        (404, "no_such_ask Instance type by id 1 is not available.", None),
        (400, "error 400/3467: Invalid args: disk 900 GB, 40 available", None),
    ],
)
def test_what_the_cloud_holds_against_the_account_is_known_by_its_words(
    status: int, msg: str, refusal: AccountFault | None
) -> None:
    error = cli.api_error("vastai create instance 1", cli.CREATE, status, msg)
    assert isinstance(error, ApiError)
    assert refusal_of(error) is refusal


@pytest.mark.parametrize(("gpu", "count", "told"), [("RTX 4090", 4, True), ("H100 SXM", 2, False)])
def test_an_instance_of_several_consumer_boards_is_told_that_they_have_no_p2p(
    gpu: str, count: int, told: bool
) -> None:
    cloud = Cloud()
    performer = Performer(cloud, get_profile("qwen3-32b"), lambda _: "master")  # type: ignore[arg-type]
    performer.perform(Create(replace(make_offer(5, gpu=gpu), num_gpus=count), "wanted", label="fleet/abc"))
    ((_, (_, more)),) = cloud.asked
    assert ("-e NCCL_P2P_DISABLE=1" in more["env"]) is told
