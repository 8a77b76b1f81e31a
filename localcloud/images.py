"""Container images and models as the local cloud knows them: how large they are, and what they need.

Sizes are what comes over the network. Those of the models of `engine/profiles.py` are the profiles' own;
of what is in no table here a stated size is assumed. Nothing is downloaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.profiles import known_profiles
from localcloud.machines import Machine
from localcloud.orders import Order
from localcloud.realism import Realism

AUTOMATIC_TAG = "@vastai-automatic-tag"
"""The tag for which the service takes the one that fits the host's driver (vast-contract 2.2)."""

IMAGE_GB, MODEL_GB = 8.0, 15.0
"""Assumed sizes in GB of an image and of a model that no table here has: of a usual CUDA image, and of the
weights of 7 billion parameters in 16 bits."""


@dataclass(frozen=True)
class ContainerImage:
    """What is known of an image's repository. tags: by CUDA version, of the automatic tag; oldest first."""

    gb: float
    cpu_archs: tuple[str, ...] = ("amd64",)
    tags: tuple[tuple[float, str], ...] = ()


_IMAGES: Mapping[str, ContainerImage] = MappingProxyType(
    {
        "vllm/vllm-openai": ContainerImage(15.0),  # engine/profiles.py
        "vastai/vllm": ContainerImage(
            12.0, tags=((12.8, "v0.11.0-cuda-12.8-mini-py312"), (13.0, "v0.20.1-cuda-13.0-mini-py312"))
        ),
        "vastai/base-image": ContainerImage(
            5.0, ("amd64", "arm64"), ((12.4, "cuda-12.4.1-auto"), (12.8, "cuda-12.8.1-auto"))
        ),
        "vastai/pytorch": ContainerImage(
            9.0, tags=((12.4, "cuda-12.4.1-auto"), (12.8, "cuda-12.8.1-auto"), (13.0, "cuda-13.0.1-auto"))
        ),
    }
)
_UNKNOWN = ContainerImage(IMAGE_GB, ("amd64", "arm64"))

_CUDA_13_SINCE = (0, 20, 1)
"""The first version of vllm/vllm-openai whose plain tag has CUDA 13.0; v0.11.0 has 12.8."""

_ERROR_804 = (
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before "
    "calling NumCudaDevices() that might have already set an error? Error 804: forward compatibility was "
    "attempted on non supported HW"
)


def _split(image: str) -> tuple[str, str]:
    """Return the repository of an image, without the hub's name, and its tag."""
    name = image.removeprefix("docker.io/").partition("@sha256:")[0]
    repository, colon, tag = name.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (name, "latest")


def image_gb(image: str) -> float:
    """Return how large an image is, GB."""
    return _IMAGES.get(_split(image)[0], _UNKNOWN).gb


def model_gb(order: Order) -> float:
    """Return how large the model is that an order's start script or environment names, GB."""
    text = "\n".join((order.onstart or "", *order.variables.values()))
    for profile in known_profiles().values():
        if profile.model in text:
            return max(0.0, profile.download_gb - image_gb(profile.image.name))
    return MODEL_GB


def with_its_tag(image: str, machine: Machine) -> str:
    """Return the image with the tag that is meant where the order leaves the choice to the service."""
    if not image.endswith(AUTOMATIC_TAG):
        return image
    repository = _split(image.removesuffix(f":{AUTOMATIC_TAG}"))[0]
    tags = _IMAGES.get(repository, _UNKNOWN).tags
    fitting = [tag for cuda, tag in tags if cuda <= machine.cuda_max_good] or [tag for _, tag in tags[:1]]
    return f"{image.removesuffix(f':{AUTOMATIC_TAG}')}:{fitting[-1] if fitting else 'latest'}"


def cuda_of(image: str) -> float | None:
    """Return the CUDA version of an image; None where that is not known."""
    repository, tag = _split(image)
    said = re.search(r"cu(?:da-?)?(\d\d)\.?(\d)", tag)
    if said:
        return float(f"{said[1]}.{said[2]}")
    if repository != "vllm/vllm-openai":
        return None
    version = tuple(int(n) for n in re.findall(r"\d+", tag)[:3])
    return 13.0 if not version or version >= _CUDA_13_SINCE else 12.8


def pull_error(image: str, machine: Machine, realism: Realism) -> str | None:
    """Return what docker says where no container can be made of the image on that machine; None if it can."""
    if realism.registry and _split(image)[0] not in _IMAGES:
        return (
            f"Error response from daemon: manifest for {image} not found: manifest unknown: manifest unknown"
        )
    if not realism.foreign_cpus or machine.cpu_arch in _IMAGES.get(_split(image)[0], _UNKNOWN).cpu_archs:
        return None
    arch = machine.cpu_arch
    return f"Error response from daemon: no matching manifest for linux/{arch} in the manifest list entries"


def driver_error(image: str, machine: Machine) -> str | None:
    """Return what vLLM dies of on a machine whose driver is older than the image's CUDA; None if it is not.

    On cards for data centres the image's own compatibility libraries work (NVIDIA, CUDA Compatibility).
    """
    cuda = cuda_of(image)
    if cuda is None or cuda <= machine.cuda_max_good or not machine.gpu_name.startswith("RTX"):
        return None
    return _ERROR_804
