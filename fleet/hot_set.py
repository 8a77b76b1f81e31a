"""Makes the hot set: the message that says what a loadbalancer must know of the instances that serve."""

from collections.abc import Callable, Iterable

from engine.profile import Profile
from engine.step_time_constants import Timing
from fleet.instance import Instance
from fleet.states import State
from web.messages.hot_set import HotInstance, HotSet, HotTiming


def make_hot_set(
    serving: Iterable[Instance],
    epoch: str,
    version: int,
    expected_hot_s: float | None,
    profile: Profile,
    master_token: Callable[[str], str],
    timing: Callable[[Instance], Timing | None],
) -> HotSet:
    """Return the hot set, which is secret: it holds the instances' master tokens.

    serving: instances that are hot or draining. expected_hot_s: seconds until the next one becomes hot.
    master_token: function from a label to its token. timing: function from an instance to its step times;
    None where they are not known.
    """

    def entry(i: Instance) -> HotInstance:
        known = timing(i)
        return HotInstance(
            id=i.id or 0,
            state="draining" if i.state is State.DRAINING else "hot",
            address=i.address or "",
            auth_url=i.auth_url or "",
            master_token=master_token(i.label),
            throughput_work_s=i.throughput_work_s,
            capacity_work=profile.throughput_on(i.gpu_name, i.num_gpus, i.gpu_told) * profile.hold_s,
            certificate=i.certificate,
            timing=None if known is None else HotTiming.of(known),
        )

    return HotSet(
        epoch=epoch,
        version=version,
        model=profile.name,
        prefill_weight=profile.prefill_weight,
        expected_output_tokens=profile.expected_output_tokens,
        expected_hot_s=expected_hot_s,
        instances=tuple(entry(i) for i in serving),
        max_model_len=profile.max_model_len,
    )
