"""The stack of all tests of this folder."""

from collections.abc import Iterator

import pytest

from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig
from tests.vllm.fleet import INSTANCES, MODEL, Fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two hot instances: one was prepared and started, the other one is rented when the autoscaler runs."""
    config = StackConfig(
        engine="vllm",
        model=MODEL,
        instances=INSTANCES - 1,
        hot=INSTANCES,
        state_dir=tmp_path_factory.mktemp("vllm") / "stack",
        autoscaler_args=("--policy-param", f"min_hot={INSTANCES}", "--policy-param", "spare=0"),
    )
    with LocalStack(config) as stack:
        yield Fleet(stack)
    end = stack.stop()
    assert (end.left_behind, dict(end.restarts)) == ((), {})
