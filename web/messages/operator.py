"""What an operator tells the autoscaler: PUT /manage and PUT /policy."""

from typing import Annotated, Any

from msgspec import Meta, Struct


class ManageBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Whether instances are started, stopped, created and destroyed at all."""

    manage: bool


class PolicyBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The policy by its name, with parameters that it checks itself."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    params: dict[str, Any] | None = None
