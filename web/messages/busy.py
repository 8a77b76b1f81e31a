"""How busy a loadbalancer is, as it tells the autoscaler each second (POST /busy), and the answer."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from engine.slo import Slo
from web.messages.decoding import BadField, decode, fits

MAX_BUSY_BODY = 4 * 2**20
"""Bytes of a report: 10,000 instances at up to 0.2 kB."""

MAX_WORK, MAX_INSTANCES = 1e15, 1e6
"""Most work and instances' worth of work that are told: more would be refused with all the rest."""

LOADBALANCER = "X-Loadbalancer"
"""The header in which a loadbalancer names itself as in its reports, also where those cannot be read."""

Requests = Annotated[int, Meta(ge=0, le=10**9)]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
Work = Annotated[float, Meta(ge=0.0, le=MAX_WORK)]
WorkCounter = Annotated[float, Meta(ge=0.0, le=1e18)]
Instances = Annotated[float, Meta(ge=0.0, le=MAX_INSTANCES)]
HotEpoch = Annotated[str, Meta(max_length=64)]


class InstanceUse(Struct, frozen=True, gc=False, omit_defaults=True):
    """What a loadbalancer reports of one instance; working_s and failures are cumulative.

    unfinished: its requests, with their work. working_s: seconds with a request under way. throughput_work_s:
    0 where it was not measured. out: why the loadbalancer does not listen to it now, if so. slow: what
    clients met there that is many times slower than elsewhere, if so.
    """

    unfinished: Requests
    work: Work
    working_s: Annotated[float, Meta(ge=0.0, le=1e12)]
    throughput_work_s: Annotated[float, Meta(ge=0.0, le=1e9)]
    failures: Counter
    out: Annotated[str, Meta(max_length=200)] | None = None
    slow: Annotated[str, Meta(max_length=300)] | None = None


Rows = Mapping[Counter, InstanceUse]

FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_BOUNDS_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0)
WHOLE_BOUNDS_S = (0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper ends of the buckets by which answers are counted, seconds; above the last there is one more."""

BucketCounts = Annotated[tuple[Counter, ...], Meta(max_length=32)]


class AnswersReport(Struct, frozen=True, gc=False):
    """How fast answers came by what clients told, as counts of all since the start, by bucket.

    first_token: from the request for a lease until the first part; token: from one part to the next; whole:
    until the end. late: first parts that were not in time.
    """

    first_token: BucketCounts
    token: BucketCounts
    whole: BucketCounts
    late: Counter


class TrafficReport(Struct, frozen=True, gc=False, omit_defaults=True):
    """What has arrived at a loadbalancer and what waits there. Tokens and turned_late are cumulative.

    output_tokens: as expected when the requests came. late: held requests that are in the late lane, behind
    those that can still be in time; turned_late: those that ever were. first_token_s, prompt_token_s: what
    counts as in time. late_bound_s: None where all wait in one line. kv_tokens: context in the memory of all
    instances; only simulated ones say so. held_by_priority: held requests of high, normal and low priority.
    """

    prompt_tokens: Counter
    output_tokens: WorkCounter
    in_flight: Requests
    late: Requests
    held_prompt_tokens: Counter
    oldest_wait_s: Annotated[float, Meta(ge=0.0, le=1e9)]
    turned_late: Counter
    first_token_s: Annotated[float, Meta(ge=1e-3, le=3600.0)]
    prompt_token_s: Annotated[float, Meta(ge=0.0, le=1.0)]
    late_bound_s: Annotated[float, Meta(ge=0.0, le=86_400.0)] | None = None
    kv_tokens: Work = 0.0
    held_by_priority: tuple[Requests, Requests, Requests] = (0, 0, 0)

    @property
    def slo(self) -> Slo:
        """The latency objective that the loadbalancer goes by: what it counts as in time."""
        return Slo(self.first_token_s, self.prompt_token_s)


NO_TRAFFIC = TrafficReport(0, 0.0, 0, 0, 0, 0.0, 0, Slo().first_token_s, Slo().prompt_token_s)
"""What a loadbalancer without `traffic` in its reports is taken to say (before 2026-11)."""


class BusyReport(Struct, frozen=True):
    """How busy a loadbalancer is. arrivals and arrived_work count from the start of its process.

    busy, demand: in instances' worth of capacity; demand counts held requests, too. hot_epoch, hot_version:
    of the hot set that the loadbalancer has. instances: by id. answers: None of one before 0.3.0.
    """

    loadbalancer: Annotated[str, Meta(min_length=1, max_length=64)]
    hot_epoch: HotEpoch | None
    hot_version: Counter | None
    busy: Instances
    demand: Instances
    held: Requests
    held_work: Work
    arrivals: Counter
    arrived_work: WorkCounter
    instances: Rows
    traffic: TrafficReport = NO_TRAFFIC
    answers: AnswersReport | None = None

    def __post_init__(self) -> None:
        """Add traffic to a report of an older loadbalancer, which has none: in_flight from its instances."""
        if self.traffic is NO_TRAFFIC:
            under_way = sum(use.unfinished for use in self.instances.values())
            msgspec.structs.force_setattr(
                self, "traffic", msgspec.structs.replace(NO_TRAFFIC, in_flight=under_way)
            )


def read_busy(raw: bytes) -> tuple[BusyReport, str | None]:
    """Return a loadbalancer's report, and what in it could not be right (None: nothing).

    A wrong row of an instance is left out, and so is wrong traffic: the rest counts. Raises BadField where
    the report cannot be used at all.
    """
    try:
        return decode(raw, BusyReport), None
    except BadField as e:
        odd = str(e)[:300]
        said = decode(raw, dict[str, msgspec.Raw])
    if "traffic" in said and not fits(said["traffic"], TrafficReport):
        del said["traffic"]
    if "answers" in said and not fits(said["answers"], AnswersReport):
        del said["answers"]
    if "instances" in said:
        rows = decode(said["instances"], dict[str, msgspec.Raw], "instances")
        good = {name: row for name, row in rows.items() if fits(msgspec.json.encode({name: row}), Rows)}
        said["instances"] = msgspec.Raw(msgspec.json.encode(good))
    return decode(msgspec.json.encode(said), BusyReport), odd


class BusyAnswer(Struct, frozen=True):
    """The autoscaler's answer to a loadbalancer's report: which hot set is the present one.

    expected_hot_s: seconds until an instance becomes hot; None: not known. odd: what in the report could not
    be right, and was left out.
    """

    hot_epoch: Annotated[str, Meta(min_length=1, max_length=64)]
    hot_version: Counter
    expected_hot_s: Annotated[float, Meta(ge=0.0, le=1e6)] | None = None
    odd: Annotated[str, Meta(max_length=300)] | None = None
