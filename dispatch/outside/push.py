"""Read the reports that instances send by themselves."""

from dispatch.types import Push
from instance_client import Ended
from web.bodies import BadField, Boolean, Choice, Field, ListOf, Mapping, Text, Whole, check_fields

MOST_EVENTS, MAX_REPORT_BODY = 2_000, 2**18
"""Of a report that is pushed, and its bytes; an instance that has more to say is polled."""


_PUSH: dict[str, Field] = {
    "boot_id": Text(1, 64),
    "number": Whole(0, 2**63),
    "after": Whole(0, 2**53),
    "seq": Whole(0, 2**53),
    "missed": Boolean(),
    "started": ListOf(Text(16, 16), MOST_EVENTS),
    "ended": ListOf(Mapping(), MOST_EVENTS),
    "model_up": Boolean(),
    "started_bytes": ListOf(Whole(0, 2**32), MOST_EVENTS, optional=True),
}

_ENDED: dict[str, Field] = {
    "id": Text(16, 16),
    "status": Choice(("finished", "aborted", "failed")),
    "output_tokens": Whole(0, 2**32),
}


def parse_push(said: object) -> Push:
    """What an instance says by itself; BadField names what is wrong with it."""
    told = check_fields(said, _PUSH)
    try:
        told["ended"] = [Ended(**check_fields(one, _ENDED)) for one in told["ended"]]
    except BadField:  # which one is looked for only now
        for n, one in enumerate(told["ended"]):
            check_fields(one, _ENDED, f"ended[{n}].")
        raise
    if len(told.get("started_bytes", told["started"])) != len(told["started"]):
        raise BadField("started_bytes", f"wanted {len(told['started'])} numbers, one for each that started")
    return Push(**told)
