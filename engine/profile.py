"""What one model needs of a machine, and how fast an instance with it is expected to be.

A profile says what a machine must have (offer query, disk), what runs on it (model, vLLM arguments) and what
to expect of it until the instance's own reports say better: throughput in work per second, prefill weight,
times to load and to start. *Work* is in output-token equivalents: `prompt_tokens * prefill_weight + expected
output tokens`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from engine.estimate import ModelShape, estimate, full_queue_work_s, kv_tokens
from engine.gpus import GPUS, Family, GpuNumbers, gpu_of, is_variant
from engine.step_time_constants import Key, Timing, row_for, slowest

USUAL_ROWS = ("13B", "awq4")
"""Model and quantization whose rows stand for a model that has no shape, as one that runs on no GPU."""

SLOWEST_GPU = "L4"
"""Of a GPU that neither its name nor its offer tells anything about, no more is promised than of this one:
it has the least bandwidth of those with 24 GB."""


@dataclass(frozen=True)
class CudaImage:
    """A container image and the version of CUDA in it: a machine with an older driver cannot run it.

    On consumers' cards it then fails with error 804 after everything was loaded (vllm#5510).
    """

    name: str
    cuda: str


# The images are for amd64, and arm64 hosts are on the market. Of hosts at 0.95 the vendor's own QA needs ten
# rentals for four runs. At $20 a TB an image and a model cost more than an hour of a 4090.
SOUND = "cpu_arch=amd64 reliability>0.98 direct_port_count>=4 inet_down_cost<0.02"
"""What is asked of every machine, in the CLI's words."""

LEAST_DAYS = 3.0
"""Days that a contract must last (duration): one that ends sooner is set up in vain."""


@dataclass(frozen=True)
class Profile:
    """What one model needs of a machine, and how fast an instance with it is expected to be.

    needs: what it asks of an offer beside SOUND, the image's CUDA and the disk, in the CLI's words. Work is
    counted in output tokens' worth. prefill_weight: work per prompt token (one output token is 1).
    throughput_work_s: work per second of one instance with all the requests it can hold; throughput_by_gpu
    has better figures for some GPUs. rows: the model and quantization of its rows of step-time constants;
    None: its name, and how its weights are kept. shape: what step times on other GPUs are estimated from;
    None for what runs on no GPU. hold_s: seconds of work an instance may be given before a new request would
    wait too long. load_time_s: seconds from order to hot on a new machine. start_time_s: seconds from start
    to hot on a stopped machine that holds the model. download_gb: image and weights, as they come over the
    network. env: environment variables of the container, no secrets; NCCL_P2P_DISABLE=1 for several GPUs on
    boards without P2P, where NCCL hangs (vllm#2466, #14449). chats: whether the model has a chat template,
    without which a machine does not become hot. pooling: it makes vectors, no text.
    """

    name: str
    model: str
    image: CudaImage
    needs: str
    disk_gb: float
    vllm_args: str
    prefill_weight: float
    throughput_work_s: float
    hold_s: float
    expected_output_tokens: float
    load_time_s: float
    start_time_s: float
    max_model_len: int
    download_gb: float
    rows: tuple[str, str] | None = None
    shape: ModelShape | None = None
    throughput_by_gpu: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    chats: bool = True
    pooling: bool = False

    def offer_query(self, speedup: float = 1.0) -> str:
        """Return the search for machines that can run it, in the CLI's words.

        speedup: of a local cloud, whose contracts are as much shorter.
        """
        fits = f"cuda_max_good>={self.image.cuda} disk_space>={self.disk_gb:g}"
        return f"{self.needs} {SOUND} {fits} duration>{LEAST_DAYS / speedup:.9g}"

    def throughput_on(self, gpu_name: str, num_gpus: int = 1, told: GpuNumbers | None = None) -> float:
        """Return the expected throughput of an instance with these GPUs, in work per second.

        told: what their offer says of them, for GPUs that are not known by name. Of GPUs that tell nothing at
        all, the profile's throughput_work_s is expected.
        """
        figure = self.throughput_by_gpu.get(_key(gpu_name, num_gpus))
        if figure is not None and not is_variant(gpu_name, told):
            return figure
        if self.shape is None or gpu_of(gpu_name, told) is None:
            return self.throughput_work_s
        return full_queue_work_s(self.timing_on(gpu_name, num_gpus, told), self.prefill_weight)

    def timing_on(
        self,
        gpu_name: str,
        num_gpus: int = 1,
        told: GpuNumbers | None = None,
        own: Mapping[Key, Timing] = MappingProxyType({}),
    ) -> Timing:
        """Return the step-time constants on these GPUs; `name` says where they come from.

        They are a row of the table (own: constants that go before it), else an estimate by arithmetic. Of
        GPUs that tell nothing the slowest row is taken: it promises too little rather than too much.
        """
        form = USUAL_ROWS if self.shape is None else (self.name, str(self.shape.weights))
        row = row_for((*(self.rows or form), gpu_name, num_gpus), own)
        if row is not None and not is_variant(gpu_name, told):
            return row
        gpu = gpu_of(gpu_name, told)
        if self.shape is None:
            return slowest(*USUAL_ROWS)
        if self.rows is not None and gpu is None:
            return slowest(*self.rows)
        name = f"{self.name} on {num_gpus}x {gpu_name}, by arithmetic"
        return estimate(name, self.shape, gpu or GPUS[SLOWEST_GPU], num_gpus, self.max_model_len)

    def env_on(self, gpu_name: str, num_gpus: int) -> Mapping[str, str]:
        """Return the environment variables of the container on these GPUs.

        NCCL hangs between several consumer boards, which have no P2P (vllm#2466, #14449), unless it is told.
        """
        known = GPUS.get(gpu_name)
        if num_gpus == 1 or (known is not None and known.family is not Family.GEFORCE):
            return self.env
        return {"NCCL_P2P_DISABLE": "1", **self.env}

    def fits(self, gpu_name: str, num_gpus: int = 1, told: GpuNumbers | None = None) -> bool | None:
        """Return whether the weights and one request of the longest fit there; None where that is unknown.

        Heads and experts are shared out evenly, so the number of GPUs must be a power of two.
        """
        gpu = gpu_of(gpu_name, told)
        if num_gpus & (num_gpus - 1):
            return False
        if self.shape is None or gpu is None:
            return None
        return kv_tokens(self.shape, gpu, num_gpus) >= self.max_model_len


def _key(gpu_name: str, num_gpus: int) -> str:
    return gpu_name if num_gpus == 1 else f"{num_gpus}x {gpu_name}"
