"""What an image and a model take and need: bandwidth, a processor, a driver."""

import pytest

from engine.profiles import get_profile
from localcloud.durations import IMAGE_MBIT_S, Downloads
from localcloud.effects import Boot
from localcloud.images import IMAGE_GB, MODEL_GB, cuda_of, image_gb, model_gb, with_its_tag
from localcloud.machines import Machine
from localcloud.orders import Order
from localcloud.phases import Phase
from localcloud.realism import HARSH
from tests.unit.localcloud.cloud_world import TIMES, CloudWorld

IMAGE = "vllm/vllm-openai:v0.11.0"
MODEL = get_profile("vllm-13").model
SLICED = Machine(7, "RTX 4090", 0.5, slots=4, sliced=True, inet_down=800.0)
SIZES, CPUS, DRIVERS = (HARSH.only([name]) for name in ("sizes", "foreign_cpus", "old_drivers"))


def test_sizes_are_the_profiles_and_a_stated_default_for_what_is_unknown() -> None:
    order = Order(image=IMAGE, onstart=f"VLLM_MODEL={MODEL}\nserve")
    assert (image_gb(IMAGE), image_gb(f"docker.io/{IMAGE}"), image_gb("me/mine")) == (15.0, 15.0, IMAGE_GB)
    assert model_gb(order) == pytest.approx(get_profile("vllm-13").download_gb - 15.0)
    assert model_gb(Order(image=IMAGE, env={"VLLM_MODEL": MODEL})) == model_gb(order)
    assert model_gb(Order(image=IMAGE)) == MODEL_GB


def test_a_pull_takes_the_image_over_the_bandwidth_and_slices_that_pull_at_once_share_it() -> None:
    world = CloudWorld([SLICED], realism=SIZES)
    order = {"image": IMAGE, "onstart": f"VLLM_MODEL={MODEL}"}
    first, second = world.rent(700, **order), world.rent(701, **order)
    world.after(5.0)  # both are made by then
    full_s = 15.0 * 8_000.0 / 800.0
    assert world.row(first)["status_msg"] == f"{IMAGE}: Downloading 0%"
    world.after(0.5 * full_s)
    assert world.row(first)["status_msg"] == f"{IMAGE}: Downloading 50%"
    world.after(0.5 * full_s + 0.1)
    assert (world.phase(first), world.phase(second)) == (Phase.RUNNING, Phase.LOADING)
    world.after(full_s)
    assert world.phase(second) is Phase.RUNNING


def test_a_model_takes_its_size_the_first_time_and_nothing_of_it_when_it_is_on_the_disk() -> None:
    world = CloudWorld([SLICED], realism=SIZES)
    mine = world.rent(700, image=IMAGE, onstart=f"VLLM_MODEL={MODEL}")
    world.after(5.0 + 15.0 * 8_000.0 / 800.0 + 0.1)
    (boot,) = (e for e in world.effects if isinstance(e, Boot))
    assert boot.load_s == pytest.approx(TIMES.start_s + 7.4 * 8_000.0 / 800.0)
    world.after(boot.load_s)
    world.did()
    world.stop(mine)
    world.after(20.0)
    world.start(mine)
    world.after(TIMES.restart_s + 0.1)
    (boot,) = (e for e in world.effects if isinstance(e, Boot))
    assert boot.load_s == TIMES.start_s


def test_no_host_pulls_faster_than_images_are_unpacked() -> None:
    downloads = Downloads(speedup=10.0)
    fast = Machine(8, "H100 SXM", 2.0, inet_down=9_000.0)
    assert downloads.begin(fast, 15.0, IMAGE_MBIT_S, 0.0) == pytest.approx(6.0)
    assert downloads.begin(fast, 15.0, IMAGE_MBIT_S, 1.0) == pytest.approx(6.0), "its link is not full"
    assert downloads.begin(fast, 15.0, 9_000.0, 100.0) == pytest.approx(15.0 * 8_000.0 / 9_000.0 / 10.0)


def test_an_image_for_another_processor_makes_no_container() -> None:
    arm = Machine(7, "GH200 SXM", 1.0, cpu_arch="arm64")
    world = CloudWorld([arm], realism=CPUS)
    mine, fits = world.rent(700, image=IMAGE), world.rent(701, image="vastai/base-image:cuda-12.8.1-auto")
    world.after(7_200.0)
    assert world.phase(mine) is Phase.CREATED
    assert "no matching manifest for linux/arm64" in world.row(mine)["status_msg"]
    assert world.phase(fits) is Phase.RUNNING
    kind = CloudWorld([arm])
    assert kind.phase(kind.running()) is Phase.RUNNING


@pytest.mark.parametrize(
    ("gpu", "cuda", "image", "dies"),
    [
        ("RTX 4090", 12.4, IMAGE, True),
        ("RTX 4090", 12.8, IMAGE, False),
        ("RTX 4090", 12.8, "vllm/vllm-openai:v0.20.1", True),
        ("A100 SXM4", 12.4, IMAGE, False),
        ("RTX 4090", 12.4, "me/mine:1", False),
    ],
)
def test_an_old_driver_kills_the_server_on_a_consumers_card(
    gpu: str, cuda: float, image: str, *, dies: bool
) -> None:
    world = CloudWorld([Machine(7, gpu, 0.5, cuda_max_good=cuda)], realism=DRIVERS)
    world.rent(700, image=image)
    world.after(200.0)
    (boot,) = (e for e in world.effects if isinstance(e, Boot))
    assert ("Error 804" in (boot.fatal_line or "")) is dies


@pytest.mark.parametrize(
    ("image", "cuda"),
    [
        (IMAGE, 12.8),
        ("vllm/vllm-openai:latest", 13.0),
        ("vllm/vllm-openai:v0.20.0", 12.8),
        ("vllm/vllm-openai:v0.20.1-cu129", 12.9),
        ("vastai/vllm:v0.11.0-cuda-12.8-mini-py312", 12.8),
        ("localhost:5000/mine", None),
    ],
)
def test_which_cuda_an_image_has(image: str, cuda: float | None) -> None:
    assert cuda_of(image) == cuda


def test_the_automatic_tag_fits_the_driver_and_is_else_the_oldest() -> None:
    image = "vastai/pytorch:@vastai-automatic-tag"
    chosen = [
        with_its_tag(image, Machine(7, "L40S", 0.5, cuda_max_good=cuda)) for cuda in (13.0, 12.8, 12.6, 11.8)
    ]
    assert [c.partition(":cuda-")[2] for c in chosen] == ["13.0.1-auto", "12.8.1-auto", *["12.4.1-auto"] * 2]
    assert with_its_tag("me/mine:@vastai-automatic-tag", Machine(7, "L40S", 0.5)) == "me/mine:latest"
    assert with_its_tag(IMAGE, Machine(7, "L40S", 0.5)) == IMAGE


@pytest.mark.parametrize(("image", "there"), [(IMAGE, True), ("vastai/vllm:x", True), ("made/up:1", False)])
def test_with_a_registry_an_image_that_nobody_made_cannot_be_pulled(image: str, *, there: bool) -> None:
    world = CloudWorld(realism=HARSH.only(["registry"]))
    rental = world.rent(700, image=image)
    world.after(300.0)
    assert (world.phase(rental) is Phase.RUNNING) is there
    assert there or "manifest unknown" in str(world.row(rental)["status_msg"])
