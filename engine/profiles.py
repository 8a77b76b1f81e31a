"""The models we know how to serve, one `Profile` each; add your own at the bottom of the table.

A profile says what a machine must have (offer query, disk), what runs on it (model, vLLM
arguments) and what to expect of it until the instance's own reports say better: throughput
in work per second, prefill weight, times to load and to start. *Work* is in output-token
equivalents: `prompt_tokens * prefill_weight + expected output tokens`.

Throughputs by GPU are what `engine/reference.py` gives at a full queue of 300-token prompts and 180-token
answers (tests/unit/engine/test_profiles.py computes them), so they are starting points: an instance's
measured rate replaces them as soon as it is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from engine.estimate import ModelShape, Weights, estimate, full_queue_work_s, kv_tokens
from engine.gpus import GPUS, GpuNumbers, gpu_of, is_variant
from engine.step_time_constants import Key, Timing, row_for, slowest
from process.errors import ConfigError

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
# rentals for four runs. At $20 a TB an image and a model cost more than an hour of a 4090. A contract that
# ends within three days (duration) is set up in vain.
SOUND = "cpu_arch=amd64 reliability>0.98 direct_port_count>=4 inet_down_cost<0.02 duration>3"
"""What is asked of every machine, in the CLI's words."""


@dataclass(frozen=True)
class Profile:
    """What one model needs of a machine, and how fast an instance with it is expected to be.

    needs: what it asks of an offer beside SOUND, the image's CUDA and the disk, in the CLI's words.
    Work is counted in output tokens' worth. prefill_weight: work per prompt token (one output token is 1).
    throughput_work_s: work per second of one instance with all the requests it can hold; throughput_by_gpu
    has better figures for some GPUs. rows: the model and quantization of its rows of step-time constants;
    None: its name, and how its weights are kept. shape: what step times on other GPUs are estimated from;
    None for what runs on no GPU. hold_s: seconds of work an instance may be given before a new request would
    wait too long. load_time_s: seconds from order to hot on a new machine. start_time_s: seconds from start
    to hot on a stopped machine that holds the model. download_gb: image and weights, as they come over the
    network. env: environment variables of the container, no secrets; NCCL_P2P_DISABLE=1 for several GPUs on
    boards without P2P, where NCCL hangs (vllm#2466, #14449). chats: whether the model has a chat template,
    without which a machine does not become hot.
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

    @property
    def offer_query(self) -> str:
        """The search for machines that can run it, in the CLI's words."""
        return f"{self.needs} {SOUND} cuda_max_good>={self.image.cuda} disk_space>={self.disk_gb:g}"

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
        model, form = self.rows or (self.name, "" if self.shape is None else str(self.shape.weights))
        row = row_for((model, form, gpu_name, num_gpus), own)
        if row is not None and not is_variant(gpu_name, told):
            return row
        gpu = gpu_of(gpu_name, told)
        last = slowest(*self.rows) if self.rows else None
        if last is not None and (gpu is None or self.shape is None):
            return last
        if self.shape is None:
            return get_profile("vllm-13").timing_on(gpu_name, num_gpus, told, own)
        name = f"{self.name} on {num_gpus}x {gpu_name}, by arithmetic"
        return estimate(name, self.shape, gpu or GPUS[SLOWEST_GPU], num_gpus, self.max_model_len)

    def fits(self, gpu_name: str, num_gpus: int = 1, told: GpuNumbers | None = None) -> bool | None:
        """Return whether the weights and one request of the longest fit there; None where that is unknown."""
        gpu = gpu_of(gpu_name, told)
        if self.shape is None or gpu is None:
            return None
        return kv_tokens(self.shape, gpu, num_gpus) >= self.max_model_len


def _key(gpu_name: str, num_gpus: int) -> str:
    return gpu_name if num_gpus == 1 else f"{num_gpus}x {gpu_name}"


_VLLM_IMAGE = CudaImage("vllm/vllm-openai:v0.11.0", "12.8")

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "vllm-13": Profile(
            name="vllm-13",
            model="TheBloke/Llama-2-13B-chat-AWQ",
            image=_VLLM_IMAGE,
            # gpu_ram is per GPU in GB; >= 22 admits the 24 GB cards, AWQ weights are 7.4 GB.
            needs="num_gpus=1 gpu_ram>=22 compute_cap>=800 inet_down>=200",
            disk_gb=40.0,
            # Llama 2 writes tool calls only where tool_choice makes it; hermes needs no tokens of its own.
            # No --quantization: awq is the slow kernel, and vLLM finds the fast one itself (vllm#21376).
            vllm_args="--max-model-len 4096 --gpu-memory-utilization 0.9 "
            "--enable-auto-tool-choice --tool-call-parser hermes",
            prefill_weight=0.1,
            throughput_work_s=620.0,  # a GPU that we have no figure for is taken for the slowest one here
            throughput_by_gpu=MappingProxyType(
                {
                    "RTX 3090": 620.0,
                    "RTX 4090": 950.0,
                    "RTX A6000": 845.0,
                    "L40S": 1170.0,
                    "A100 SXM4": 1720.0,
                    "H100 SXM": 3650.0,
                }
            ),
            rows=("13B", "awq4"),
            # Llama 2 13B: docs/reference/timing.md 3; the file of weights is 7.25 GB.
            shape=ModelShape(13.02, 13.02, 7.25, Weights.W4, 40, 5120, 819_200),
            hold_s=6.0,
            expected_output_tokens=180.0,
            load_time_s=600.0,
            start_time_s=90.0,
            max_model_len=4096,
            download_gb=22.4,  # image 15, weights 7.4
        ),
        "vllm-70": Profile(
            name="vllm-70",
            model="hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",
            image=_VLLM_IMAGE,
            needs="num_gpus<=2 gpu_total_ram>=78 compute_cap>=800 inet_down>=500",
            disk_gb=80.0,
            vllm_args="--max-model-len 8192 --gpu-memory-utilization 0.92 "
            "--enable-auto-tool-choice --tool-call-parser llama3_json",
            prefill_weight=0.1,
            throughput_work_s=490.0,
            throughput_by_gpu=MappingProxyType(
                {"2x RTX A6000": 490.0, "A100 SXM4": 570.0, "2x A100 SXM4": 1220.0, "H100 SXM": 1310.0}
            ),
            rows=("70B", "awq4"),
            shape=ModelShape(70.55, 70.55, 39.8, Weights.W4, 80, 8192, 327_680),
            hold_s=8.0,
            expected_output_tokens=220.0,
            load_time_s=3600.0,
            start_time_s=210.0,
            max_model_len=8192,
            download_gb=54.8,  # image 15, weights 39.8
        ),
        # For the local cloud's engine vllm: real vLLM on two cores, with random weights of 0.9 MB that
        # localcloud/tiny_model.py makes; its image names their directory in VLLM_MODEL. No GPU is used.
        "tiny": Profile(
            name="tiny",
            model="tiny-random-llama",
            image=_VLLM_IMAGE,
            needs="num_gpus=1",
            disk_gb=10.0,
            # Without --enforce-eager it compiles for 25 s at its first boot, with a C++ compiler. With it
            # bfloat16 uses AMX where a processor has that, and vLLM 0.32.0 dies of an illegal instruction
            # if its first prompt is short: only a longer one makes it ask the kernel for AMX. Four at once,
            # so that a small load fills it.
            vllm_args="--max-model-len 1024 --dtype float32 --max-num-seqs 4 --enforce-eager "
            "--enable-auto-tool-choice --tool-call-parser hermes",
            # Measured on one core of two, 2026-11-26: 390 output tokens/s with one request, 1,370 with 4,
            # 3,700 with 16; 45,000 prompt tokens/s.
            prefill_weight=0.03,
            throughput_work_s=1370.0,
            # Twice what an answer of 200 tokens takes when nothing else runs: an instance that may hold no
            # more than one answer is given one at a time, and seems slower and slower by that.
            hold_s=1.0,
            expected_output_tokens=200.0,
            load_time_s=45.0,  # 20 s of one core, twice that when nothing of vLLM is in memory yet
            start_time_s=30.0,
            max_model_len=1024,
            download_gb=15.0,
        ),
        # Your own model: copy an entry, give it a name, and pass that name to --model. Its vllm_args name the
        # parser of its tool calls, without which vLLM refuses tools, and --reasoning-parser if it thinks
        # aloud (those here do not).
    }
)


def get_profile(name: str) -> Profile:
    """Return the model profile of that name; for another name raise a ConfigError with the known ones."""
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(
            f"unknown model {name!r}: known are {', '.join(sorted(PROFILES))} (engine/profiles.py)"
        ) from None
