"""Faults of the cloud: every one that the local cloud can play, and machines destroyed behind our back."""

import contextlib
from collections.abc import Iterator, Mapping

from bench.chaos.kinds import Effect, Kind, NotNow, Scene, running
from localcloud.faults import FAULTS, Scope

ARGUMENTS: Mapping[str, Mapping[str, object]] = {
    "list-missing": {"share": 0.4},
    "dies-hot": {"after_s": 1.0},
    "slow-pull": {"factor": 3.0},
}
"""Of faults that have parameters, what they are given."""

ROUTED = ("api-error", "api-hangs")
"""Faults that strike a route, before or after the effect: chosen anew each time."""


def cloud_fault(name: str, **more: object) -> Effect:
    """A fault of the local cloud is on; those of an instance strike one. more: its parameters."""
    scope = FAULTS[name].scope

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        arguments: dict[str, object] = {
            "name": name,
            "seconds": round(scene.for_s, 2),
            **{**ARGUMENTS.get(name, {}), **more},
        }
        if name == "list-missing" and not more:
            arguments["which"] = scene.rng.choice(("newest", "random"))
        if name in ROUTED:
            arguments["when"] = scene.rng.choice(("before", "after"))
            arguments["route"] = scene.rng.choice(
                ("any", "list", "show", "search", "create", "change", "destroy")
            )
        if scope is Scope.INSTANCE:
            with scene.truth.lock:
                ids = [row["id"] for row in scene.truth.rows]
            if not ids:
                raise NotNow
            arguments["instance_id"] = struck = scene.rng.choice(ids)
            scene.truth.hurt(struck, name, scene.for_s)
        elif scope is Scope.ACCOUNT:
            scene.truth.hurt_all(name, scene.for_s)
        scene.say(" ".join(str(v) for k, v in arguments.items() if k not in ("name", "seconds")))
        if scene.stack.ask_cloud("/localcloud/faults", arguments) is None:
            raise NotNow
        try:
            yield
        finally:
            if scope is Scope.INSTANCE:
                scene.truth.hurt(struck, name)
            elif scope is Scope.ACCOUNT:
                scene.truth.hurt_all(name)

    return effect


@contextlib.contextmanager
def destroy(scene: Scene) -> Iterator[None]:
    """Somebody destroys a machine behind our back."""
    row = scene.rng.choice(running(scene, ("running", "stopped", "loading")))
    instance_id = int(str(row["id"]))
    scene.truth.end_by_us(instance_id)
    scene.say(str(instance_id))
    scene.stack.ask_cloud(f"/api/v0/instances/{instance_id}/", {}, method="DELETE")
    yield


def kill_instance(part: str) -> Effect:
    """An instance's processes are killed, or its model server."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        instance_id = int(str(scene.rng.choice(running(scene))["id"]))
        scene.truth.hurt(instance_id, f"killed: {part}")
        scene.say(str(instance_id))
        scene.stack.ask_cloud(f"/localcloud/instances/{instance_id}/kill", {"part": part})
        yield

    return effect


KINDS = (
    *(
        Kind(f"cloud:{name}", cloud_fault(name), (2.0, 15.0), f"cloud:{name}", dark=name == "credit-zero")
        for name in FAULTS
    ),
    Kind(
        "list-missing-long",
        cloud_fault("list-missing", which="newest"),
        (40.0, 50.0),
        "cloud:list-missing",
        frozenset({"trial"}),
    ),
    Kind("destroyed-behind", destroy, (0.5, 1.0)),
    Kind("instance-killed", kill_instance("all"), (0.5, 1.0)),
    Kind("model-killed", kill_instance("model"), (0.5, 1.0)),
)
