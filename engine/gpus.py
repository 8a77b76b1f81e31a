"""GPU kinds: what their data sheets promise, by the name that Vast gives them, and what an offer says itself.

Sources of each number: docs/reference/gpus.md. A kind that is not here is taken by what its offer says, whose
flops are those of the ordinary cores at fp32: the tensor cores do a multiple of them that depends on the
family (`_family`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

HBM_GB_S_PER_TFLOP = 45.0
"""Bandwidth over fp32 flops from which a GPU has stacked memory: A100 99, V100 57, H100 50; the others have 9
to 30 (GB/s per TFLOPS)."""

PRO_MEM_GB = 40.0
"""Memory of one GPU from which one without stacked memory is no consumer card, GB: those have at most 32."""

VARIANT_MEMORY = 0.9
"""Share of the memory of its kind below which a GPU is another board under the same name: the driver keeps
up to 7 % to itself (L40S: 46,068 of 49,152 MB)."""

TENSOR_PER_FP32 = {"geforce": 2.0, "pro": 4.0, "hbm": 15.0}
"""16-bit flops of the tensor cores, summed in 32 bits, over the flops at fp32: RTX 3090, 4090, 5090 2.0; RTX
A6000, L40S 4.0; A100 16.0, H100 14.8."""


class Family(StrEnum):
    """Kinds of GPU that use the same share of what their data sheets promise."""

    GEFORCE = "geforce"
    PRO = "pro"
    HBM = "hbm"


@dataclass(frozen=True)
class GpuModel:
    """One GPU. mem_gb: memory. gb_s: its bandwidth. tflops: 16-bit, summed in 32 bits, without sparsity."""

    mem_gb: float
    gb_s: float
    tflops: float
    family: Family
    nvlink: bool = False


@dataclass(frozen=True)
class GpuNumbers:
    """What an offer says of one of its GPUs; 0 is what it does not say.

    mem_gb: memory in GB. gb_s: bandwidth in GB/s. fp32_tflops: flops at fp32 in TFLOPS.
    """

    mem_gb: float
    gb_s: float
    fp32_tflops: float


def _geforce(mem_gb: float, gb_s: float, tflops: float) -> GpuModel:
    return GpuModel(mem_gb, gb_s, tflops, Family.GEFORCE)


def _pro(mem_gb: float, gb_s: float, tflops: float) -> GpuModel:
    return GpuModel(mem_gb, gb_s, tflops, Family.PRO)


def _hbm(mem_gb: float, gb_s: float, tflops: float, *, nvlink: bool = False) -> GpuModel:
    return GpuModel(mem_gb, gb_s, tflops, Family.HBM, nvlink)


GPUS: Mapping[str, GpuModel] = MappingProxyType(
    {
        "RTX 3060": _geforce(12, 360, 25.6),
        "RTX 3070": _geforce(8, 448, 40.6),
        "RTX 3080": _geforce(10, 760, 59.5),
        "RTX 3080 Ti": _geforce(12, 912, 68.2),
        "RTX 3090": _geforce(24, 936, 71.0),
        "RTX 3090 Ti": _geforce(24, 1008, 80.0),
        "RTX 4060 Ti": _geforce(16, 288, 44.1),
        "RTX 4070": _geforce(12, 504, 58.3),
        "RTX 4070 Ti": _geforce(12, 504, 80.2),
        "RTX 4070S": _geforce(12, 504, 71.0),
        "RTX 4070S Ti": _geforce(16, 672, 88.2),
        "RTX 4080": _geforce(16, 717, 97.5),
        "RTX 4080S": _geforce(16, 736, 104.4),
        "RTX 4090": _geforce(24, 1008, 165.2),
        "RTX 4090D": _geforce(24, 1008, 147.1),
        "RTX 5060 Ti": _geforce(16, 448, 47.4),
        "RTX 5070": _geforce(12, 672, 61.7),
        "RTX 5070 Ti": _geforce(16, 896, 87.9),
        "RTX 5080": _geforce(16, 960, 112.6),
        "RTX 5090": _geforce(32, 1792, 209.5),
        "RTX A4000": _pro(16, 448, 76.7),
        "RTX A5000": _pro(24, 768, 111.1),
        "RTX A6000": _pro(48, 768, 154.8),
        "RTX 4000Ada": _pro(20, 360, 107.0),
        "RTX 5000Ada": _pro(32, 576, 261.1),
        "RTX 6000Ada": _pro(48, 960, 364.2),
        "RTX PRO 5000": _pro(48, 1344, 294.8),
        "RTX PRO 6000 WS": _pro(96, 1792, 503.8),
        "RTX PRO 6000 S": _pro(96, 1597, 480.0),
        "A10": _pro(24, 600, 125.0),
        "A40": _pro(48, 696, 149.7),
        "L4": _pro(24, 300, 121.0),
        "L40": _pro(48, 864, 181.0),
        "L40S": _pro(48, 864, 362.1),
        "Tesla T4": _pro(16, 320, 65.0),
        "Tesla V100": _hbm(32, 897, 112.0),
        "A100 PCIE": _hbm(80, 1935, 312.0),
        "A100 SXM4": _hbm(80, 2039, 312.0, nvlink=True),
        "H100 PCIE": _hbm(80, 2039, 756.0),
        "H100 NVL": _hbm(94, 3938, 835.0),
        "H100 SXM": _hbm(80, 3350, 989.0, nvlink=True),
        "GH200 SXM": _hbm(96, 4022, 989.0),
        "H200 NVL": _hbm(141, 4800, 835.0),
        "H200": _hbm(141, 4800, 989.0, nvlink=True),
        "B200": _hbm(180, 8000, 2250.0, nvlink=True),
    }
)
"""The GPUs that are known by name."""


def gpu_of(name: str, told: GpuNumbers | None = None) -> GpuModel | None:
    """Return that kind of GPU, else one by the numbers of its offer, else None."""
    known = GPUS.get(name)
    if known is not None:
        return _variant(known, told) if told is not None and is_variant(name, told) else known
    if told is None or not (told.mem_gb and told.gb_s and told.fp32_tflops):
        return None
    return by_numbers(told)


def is_variant(name: str, told: GpuNumbers | None) -> bool:
    """Return whether an offer's GPU has much less memory than others of its name, as an A100 of 40 GB."""
    known = GPUS.get(name)
    return known is not None and told is not None and 0.0 < told.mem_gb < VARIANT_MEMORY * known.mem_gb


def _variant(known: GpuModel, told: GpuNumbers) -> GpuModel:
    return replace(known, mem_gb=told.mem_gb, gb_s=min(known.gb_s, told.gb_s or known.gb_s))


def by_numbers(told: GpuNumbers) -> GpuModel:
    """Return the GPU that an offer's own numbers describe, all of them over 0."""
    family = _family(told)
    return GpuModel(told.mem_gb, told.gb_s, told.fp32_tflops * TENSOR_PER_FP32[family], family)


def _family(told: GpuNumbers) -> Family:
    if told.gb_s / told.fp32_tflops >= HBM_GB_S_PER_TFLOP:
        return Family.HBM
    return Family.PRO if told.mem_gb >= PRO_MEM_GB else Family.GEFORCE
