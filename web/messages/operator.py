"""What an operator tells the autoscaler: PUT /manage, PUT /policy, POST /machines/ID/ban."""

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
