"""What an instance sees of its image, its order and its ports."""

import os
from pathlib import Path

import pytest

from localcloud import engines
from localcloud.container import environment
from localcloud.effects import Boot
from localcloud.engines import ENGINES
from localcloud.machines import MACHINES
from localcloud.orders import Order

BOOT = Boot(
    id=7,
    boot=1,
    order=Order("vllm/vllm-openai:x", env={"-p 8000:8000": "1", "A": "7", "OMP_NUM_THREADS": "3"}),
    machine=MACHINES[0],
    authorized_keys=(),
    keep_ports={},
    drop_ports=False,
    load_s=0.0,
    start_s=0.0,
    fatal_line=None,
    new_host_key=False,
    ssh="ok",
)


def seen_by(path: Path, engine: str) -> dict[str, str]:
    """What an instance of that engine sees."""
    return environment(path, BOOT, {"8000/tcp": 20_123}, ENGINES[engine])


def test_the_image_of_the_paced_engine_has_our_python_and_the_stand_in() -> None:
    seen = seen_by(Path("/i/7"), "paced")
    assert seen["PYTHONPATH"].split(os.pathsep)[0].endswith("/localcloud/image")
    assert "VLLM_MODEL" not in seen


def test_the_image_of_real_vllm_has_its_python_its_model_and_nothing_of_ours() -> None:
    seen = seen_by(Path("/i/7"), "vllm")
    assert seen["PATH"].split(":")[0] == str(engines.VLLM_ENVIRONMENT / "bin")
    assert [p.name for p in Path(seen["PYTHONPATH"]).iterdir()] == ["vllm-0.32.0.dist-info"]
    assert seen["VLLM_MODEL"] == str(engines.TINY_MODEL)
    assert (seen["VLLM_TARGET_DEVICE"], seen["HF_HUB_OFFLINE"]) == ("cpu", "1")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_instance_has_its_own_home_and_tmp_and_what_its_order_says(engine: str) -> None:
    """As with docker, -e goes before what the image sets, and HOME is the container's."""
    seen = seen_by(Path("/i/7"), engine)
    assert (seen["HOME"], seen["TMPDIR"]) == ("/i/7/home", "/i/7/tmp")
    assert (seen["A"], seen["OMP_NUM_THREADS"], seen["FLEET_PORT_8000"]) == ("7", "3", "20123")
