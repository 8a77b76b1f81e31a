"""What an offer or a row of the listing says of its GPUs, beside their name."""

from engine.gpus import GpuNumbers
from vast.rows import Offer, Row

MB_A_GB = 1024.0


def numbers_of(listed: Offer | Row) -> GpuNumbers:
    """Return memory, bandwidth and flops of one of its GPUs, as far as they are said."""
    return GpuNumbers(
        (listed.gpu_ram_mb or 0.0) / MB_A_GB,
        listed.gpu_mem_bw_gb_s or 0.0,
        (listed.total_tflops or 0.0) / listed.num_gpus,
    )
