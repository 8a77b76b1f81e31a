"""What an offer or a row of the listing says of its GPUs, beside their name."""

from engine.gpus import GpuNumbers
from vast.rows import Offer, Row

MB_A_GB = 1024.0


def numbers_of(listed: Offer | Row, before: GpuNumbers | None = None) -> GpuNumbers:
    """Return memory, bandwidth and flops of one of its GPUs, as far as they are said.

    before: what was said earlier; the numbers of a listing may be missing.
    """
    earlier = before or GpuNumbers(0.0, 0.0, 0.0)
    return GpuNumbers(
        (listed.gpu_ram_mb or 0.0) / MB_A_GB or earlier.mem_gb,
        listed.gpu_mem_bw_gb_s or earlier.gb_s,
        (listed.total_tflops or 0.0) / listed.num_gpus or earlier.fp32_tflops,
    )
