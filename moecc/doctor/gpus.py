"""Look at CUDA devices and measure the link to each, which experts come through."""

from collections.abc import Iterator

import torch

from moecc.codegen.gpus import GPUS
from moecc.doctor.check import Check, limited, ok
from moecc.measuring import alternate

_COPIED = 256 << 20


def gpus() -> Iterator[Check]:
    """Check what devices there are and whether kernels are compiled for them."""
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "no CUDA device"
        yield ok("GPU", f"{why}: models run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        name, (major, minor) = f"GPU {number}", torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        target = f"sm_{major}{minor}"
        about = f"{torch.cuda.get_device_name(number)}, {target}, {free / 1e9:.1f} of "
        about += f"{total / 1e9:.1f} GB free"
        if target in GPUS:
            yield ok(name, about)
        else:
            fix = "add it to codegen/gpus.py; until then kernels keep to the limits of another one"
            yield limited(name, f"{about}; moecc has no figures of it", fix)
        if free < 4 * _COPIED:
            yield limited(f"{name} link", "too little memory to measure", "close other programs")
            continue
        yield from _speeds(name, torch.device("cuda", number))


def _speeds(name: str, device: torch.device) -> Iterator[Check]:
    host = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    took = alternate(
        {"link": lambda _: copy(there, host), "memory": lambda _: copy(other, there)}, seconds=0.3
    )
    link, memory = _COPIED / took["link"], 2 * _COPIED / took["memory"]
    yield ok(f"{name} link", f"{link / 1e9:.1f} GB/s from pinned memory", measured=link)
    yield ok(f"{name} memory", f"{memory / 1e9:,.0f} GB/s, read and written", measured=memory)
