"""Launch Triton kernels without a GPU: everything happens but the launch.

    with dry_run(90) as launches:
        kernel[grid](*cpu_tensors)

Triton specialises on the arguments, compiles for the architecture and checks the shared memory as
it would on the GPU; then the launch is recorded. One `dry_run` is one new device: nothing that was
compiled before counts.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from moecc.codegen.gpus import gpu

_devices = itertools.count(1000)


@dataclass
class Launches:
    """What a dry run did."""

    compiled: list[str] = field(default_factory=list)
    """Names of the kernels that were loaded, each once per compilation."""
    launched: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    """Name and grid of every launch."""


@contextlib.contextmanager
def dry_run(arch: int) -> Iterator[Launches]:
    """Record launches on a device of an architecture such as 90."""
    before, launches = driver._active, Launches()
    driver.set_active(DryRunDriver(arch, launches))
    try:
        yield launches
    finally:
        driver._active = before


class DryRunDriver(DriverBase):
    """A CUDA driver that holds CPU tensors and runs nothing."""

    def __init__(self, arch: int, launches: Launches) -> None:
        self.target, self.device, self.launches = (
            GPUTarget("cuda", arch, 32),
            next(_devices),
            launches,
        )
        self.utils = self
        self.launcher_cls = self.make_launcher

    def get_device_properties(self, device: int) -> dict[str, int]:
        limit = gpu(f"sm_{self.target.arch}").shared_limit
        return {"max_shared_mem": limit, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        self.launches.compiled.append(name)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads at most

    def make_launcher(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *_: Any) -> None:
            self.launches.launched.append((metadata.name, (x, y, z)))

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    @classmethod
    def is_active(cls) -> bool:
        return True
