"""Describe the GPUs that kernels are compiled for: what a block may use, how many run at a time.

Limits are those of the CUDA programming guide (compute capabilities) and of AMD's CDNA3 ISA; rates
are the data sheets' of one board each. Nothing here is measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from moecc.runtime.errors import OptionError

PARTITIONS = 4
"""Of an SM, or SIMDs of a compute unit: each holds the registers of every fourth warp."""
LANE_REGISTERS = 512
"""Of a partition for each lane of a warp, on every target here."""
KB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One target and a board that has it."""

    name: str
    """`sm_90`, `gfx942`."""
    board: str
    sms: int
    bandwidth: float
    """Of memory, bytes a second."""
    product_rate: float
    """Of dense half precision products, FLOPs a second."""
    float32_rate: float
    """Of float32 products without tensor cores."""
    warps: int
    """On an SM at a time."""
    blocks: int
    shared: int
    """Bytes of shared memory of an SM."""
    shared_limit: int
    """Bytes that one block may use. Triton checks this when it loads a kernel, not when it compiles
    one."""
    reserved: int = KB
    """Bytes of shared memory that each block takes beside its own."""
    tensor_cores: str = "HMMA"
    """Their instruction."""
    descriptors: bool = False
    """Copies tiles of tensors by descriptor (TMA)."""
    gathers: bool = False
    """Such a copy may be of rows that lie apart."""

    @property
    def is_amd(self) -> bool:
        """Tell whether this is no CUDA device."""
        return self.name.startswith("gfx")

    @property
    def warp_size(self) -> int:
        """Threads of a warp."""
        return 64 if self.is_amd else 32

    @property
    def wide_products(self) -> bool:
        """Tell whether a tensor core instruction takes 64 rows at least, 8 columns at least."""
        return self.tensor_cores in ("HGMMA", "UTCHMMA")

    @property
    def tensor_memory(self) -> bool:
        """Tell whether accumulators lie in a memory of their own (tcgen05), not in registers."""
        return self.tensor_cores == "UTCHMMA"

    def blocks_per_sm(self, registers: int, warps: int, shared: int) -> int:
        """Count the blocks that an SM runs at a time; 0 if one does not fit.

        registers are those of a thread, warps and bytes of shared memory those of a block.
        """
        if shared > self.shared_limit or registers > LANE_REGISTERS:
            return 0
        in_partition = LANE_REGISTERS // max(math.ceil(registers / 8) * 8, 1)
        limits = [in_partition * PARTITIONS // warps, self.warps // warps, self.blocks]
        if used := math.ceil((shared + self.reserved) / 128) * 128:
            limits.append(self.shared // used)
        return min(limits)


_CONSUMER: dict[str, Any] = {"shared": 100 * KB, "shared_limit": 99 * KB, "warps": 48}
_HOPPER: dict[str, Any] = {"shared": 228 * KB, "shared_limit": 227 * KB, "warps": 64, "blocks": 32}
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="sm_80",
            board="A100 80GB SXM",
            sms=108,
            bandwidth=2.039e12,
            product_rate=312e12,
            float32_rate=19.5e12,
            warps=64,
            blocks=32,
            shared=164 * KB,
            shared_limit=163 * KB,
        ),
        Gpu(
            name="sm_86",
            board="RTX 3090",
            sms=82,
            bandwidth=0.936e12,
            product_rate=71e12,
            float32_rate=35.6e12,
            blocks=16,
            **_CONSUMER,
        ),
        Gpu(
            name="sm_89",
            board="RTX 4090",
            sms=128,
            bandwidth=1.008e12,
            product_rate=165e12,
            float32_rate=82.6e12,
            blocks=24,
            **_CONSUMER,
        ),
        Gpu(
            name="sm_90",
            board="H100 SXM",
            sms=132,
            bandwidth=3.35e12,
            product_rate=989e12,
            float32_rate=67e12,
            tensor_cores="HGMMA",
            descriptors=True,
            **_HOPPER,
        ),
        Gpu(
            name="sm_100",
            board="B200",
            sms=148,
            bandwidth=8.0e12,
            product_rate=2250e12,
            float32_rate=80e12,
            tensor_cores="UTCHMMA",
            descriptors=True,
            gathers=True,
            **_HOPPER,
        ),
        Gpu(
            name="sm_120",
            board="RTX 5090",
            sms=170,
            bandwidth=1.792e12,
            product_rate=209e12,
            float32_rate=104.8e12,
            blocks=24,
            descriptors=True,
            **_CONSUMER,
        ),
        Gpu(
            name="gfx942",
            board="MI300X",
            sms=304,
            bandwidth=5.3e12,
            product_rate=1307e12,
            float32_rate=163.4e12,
            warps=32,
            blocks=32,
            shared=64 * KB,
            shared_limit=64 * KB,
            reserved=0,
            tensor_cores="v_mfma",
        ),
    )
}


def gpu(target: str) -> Gpu:
    """Look a target up; raises `OptionError` naming those that there are."""
    if target not in GPUS:
        raise OptionError(f"target {target!r} is not one of {', '.join(GPUS)}")
    return GPUS[target]


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Describe a device by its target, or by the newest one here that is older, and its own SMs.

    Tensors that are on no GPU stand for some of an H100, so that tests need none.
    """
    if device.type != "cuda":
        return GPUS["sm_90"]
    if torch.version.hip is not None:
        return GPUS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    numbers = [int(name[3:]) for name, gpu in GPUS.items() if not gpu.is_amd]
    older = [number for number in numbers if number <= 10 * major + minor]
    known = GPUS[f"sm_{max(older, default=min(numbers))}"]
    return replace(known, sms=torch.cuda.get_device_properties(device).multi_processor_count)
