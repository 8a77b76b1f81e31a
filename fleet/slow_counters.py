"""Whether the counters of machines that clients find slow show the same: a second kind of evidence."""

from collections.abc import Iterable

from engine.profile import Profile
from fleet.durations import median
from fleet.instance import Instance
from fleet.slowness import SLOW_RATIO


def compare_counters(hot: Iterable[Instance], profile: Profile) -> None:
    """Note for each hot machine that clients find slow whether it does a small share of what its peers do.

    What it does is measured by the loadbalancers from the machine's own counters (work a second), and is
    taken as a share of what its GPU should do by the profile.
    """
    due = ((i, profile.throughput_on(i.gpu_name, i.num_gpus, i.gpu_told)) for i in hot)
    shares = [(i.trouble.slow, i.throughput_work_s / work_s) for i, work_s in due]
    usual = median([share for slow, share in shares if slow.clients is None])
    for slow, share in shares:
        if slow.clients is None:
            continue
        small = usual is not None and share * SLOW_RATIO <= usual
        said = f"by its own counters it does {share:.0%} of what its GPU should, its peers {usual:.0%}"
        slow.note_word(said if small else None)
