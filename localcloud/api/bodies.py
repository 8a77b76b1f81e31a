"""Reads the bodies of API calls; each function raises CloudRefusal in the service's words for a wrong one."""

from collections.abc import Mapping
from typing import Any

from flask import request

from localcloud.orders import CloudRefusal, Order

MIN_DISK_GB = 8.0
MAX_ONSTART = 16_384
MAX_LABEL = 256
MAX_ENV, MAX_ENV_ENTRIES = 32_768, 256  # characters of names and values, and how many (vast-contract 9)


def body() -> dict[str, Any]:
    """Return the body of the request being served as a JSON object; raise CloudRefusal when it is none."""
    try:
        said = request.get_json(force=True, silent=True)
    except RecursionError:
        said = None
    if not isinstance(said, dict):
        raise bad("wanted a JSON object")
    return said


def bad(text: str, **also: Any) -> CloudRefusal:
    """Return the refusal of a call with wrong arguments. also: further fields of the answer."""
    return CloudRefusal(400, "invalid_args", f"error 400/3467: Invalid args: {text}", **also)


def ssh_key(said: Mapping[str, Any]) -> str:
    """Return the public ssh key in the field ssh_key of a body."""
    key = said.get("ssh_key")
    if not isinstance(key, str) or len(key.split()) < 2 or len(key) > 4096 or "\n" in key.strip():
        raise bad("ssh_key: wanted a public key on one line")
    return key.strip()


def ids(said: object, name: str) -> list[int]:
    """Return a list of whole numbers from a body. name: of its field, for the refusal of anything else."""
    if not isinstance(said, list) or not all(type(i) is int for i in said):
        raise bad(f"{name}: wanted a list of numbers")
    return said


def number(said: object, default: int) -> int:
    """Return a number that travels as text; the default for other text, as the service is lenient there."""
    try:
        return int(str(said))
    except ValueError:
        return default


def price(said: object) -> float | None:
    """Return the bid in a body, $/h; None if there is none."""
    if said is None:
        return None
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0.001 <= said <= 128.0:
        raise CloudRefusal(400, "invalid_price", f"price: wanted 0.001 to 128, got {said!r:.40}")
    return float(said)


def order(said: Mapping[str, Any], instance_key: str, offer_id: int) -> Order:
    """Return what a call to rent an offer orders, from its body (vast-contract 2.2)."""

    def text(name: str, most: int) -> str | None:
        value = said.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > most):
            raise bad(f"{name}: wanted text of at most {most} characters", ask_id=offer_id)
        return value

    image = text("image", 1024)
    if not image:
        raise bad("image: is missing", ask_id=offer_id)
    disk = said.get("disk", 10.0)
    if isinstance(disk, bool) or not isinstance(disk, int | float) or not MIN_DISK_GB <= disk <= 1e6:
        raise bad(f"disk: wanted {MIN_DISK_GB:g} or more", ask_id=offer_id)
    env = said.get("env") or {}
    if not isinstance(env, dict) or not all(isinstance(v, str) for v in env.values()):
        raise bad("env: wanted an object of texts", ask_id=offer_id)
    if len(env) > MAX_ENV_ENTRIES or sum(len(name) + len(value) for name, value in env.items()) > MAX_ENV:
        raise bad(f"env: at most {MAX_ENV_ENTRIES} entries of {MAX_ENV} characters in all", ask_id=offer_id)
    args = said.get("args") or []
    if not isinstance(args, list) or not all(isinstance(a, str) for a in args):
        raise bad("args: wanted a list of texts", ask_id=offer_id)
    return Order(
        image=image,
        disk_gb=float(disk),
        label=text("label", MAX_LABEL),
        env=env,
        onstart=text("onstart", MAX_ONSTART),
        price=price(said.get("price")),
        cancel_unavail=said.get("cancel_unavail") is True,
        runtype=text("runtype", 100) or "ssh",
        args=tuple(args),
        instance_key=instance_key,
        image_login=text("image_login", 1024),
    )
