"""What an operator tells the autoscaler: PUT /manage, PUT /policy, POST /machines/ID/ban, POST /what-if."""

from typing import Annotated, Any

from msgspec import Meta, Struct


class ManageBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of PUT /manage: whether the autoscaler starts, stops, creates and destroys instances."""

    manage: bool


class PolicyBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of PUT /policy: the policy's name, and parameters, which the policy checks itself."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    params: dict[str, Any] | None = None


class BanBody(Struct, frozen=True, forbid_unknown_fields=True):
    """For how long a machine is not rented."""

    hours: Annotated[float, Meta(ge=0.01, le=8760.0)] = 24.0


class WhatIfBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /what-if: what is to be otherwise than it is. goal stands for policy objective.

    gpu: only machines with that GPU.
    """

    goal: Annotated[float, Meta(ge=0.5, le=0.99999)] | None = None
    policy: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    params: dict[Annotated[str, Meta(pattern=r"\A[a-z_]{1,40}\Z")], float] | None = None
    max_instances: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    max_dollars_per_hour: Annotated[float, Meta(ge=0.01, le=1e6)] | None = None
    gpu: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9 ._-]{1,64}\Z")] | None = None
