"""Compile Triton kernels for a GPU that is not there, and read what they use.

Triton's wheel brings ptxas, the CUDA binary tools and LLVM for AMD, so neither a driver nor a
toolkit is needed. The numbers are those of the machine code that the GPU would run; how fast it
would run is not among them.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from moecc.codegen import machine_code
from moecc.codegen.gpus import gpu
from moecc.codegen.machine_code import ASYNC_COPIES, TENSOR_CORES, of_kind
from moecc.codegen.router_spec import RouterSpec
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_launches import Launch

_TRITON_TYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one kernel uses on one target."""

    kernel: str
    """Name and tile: `grouped_down 64x128x64`."""
    target: str
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of stack and local memory per thread: registers that did not fit."""
    shared: int
    """Bytes of shared memory per block."""
    warps: int
    """Per block."""
    instructions: Mapping[str, int]
    """How often each opcode stands in the code: `HGMMA`, `LDGSTS`, `LDG.128`."""
    loop: Mapping[str, int]
    """The same in the loop that runs most (`MachineCode.hot_loop`)."""

    @property
    def blocks(self) -> int:
        """Blocks that an SM runs at a time, 0 if one does not fit."""
        return gpu(self.target).blocks_per_sm(self.registers, self.warps, self.shared)

    @property
    def occupancy(self) -> float:
        """Part of the warps that an SM could run at a time."""
        return self.blocks * self.warps / gpu(self.target).warps

    @property
    def fits(self) -> bool:
        """Tell whether a block gets the shared memory that it asks for."""
        return self.shared <= gpu(self.target).shared_limit

    @property
    def products(self) -> str:
        """Name the tensor core instruction; empty without one."""
        return next((one for one in TENSOR_CORES if of_kind(self.instructions, (one,))), "")

    @property
    def async_copies(self) -> int:
        """Count the instructions that copy to shared memory past the registers."""
        return of_kind(self.instructions, ASYNC_COPIES)


def argument_types(spec: KernelSpec, launch: Launch) -> dict[str, str]:
    """Name the Triton type of each run-time argument; hidden states have the weights' dtype."""
    dtype = _TRITON_TYPE[spec.dtype]
    weights = "*u8" if spec.schemes else f"*{dtype}"
    pointers = {
        "weight_ptr": weights,
        "up_ptr": weights,
        "ids_ptr": "*i64",
        "slots_ptr": "*i64",
        "weights_ptr": "*fp32",
        **dict.fromkeys(
            ("order_ptr", "tiles_ptr", "counts_ptr", "before_ptr", "totals_ptr"), "*i32"
        ),
    }
    pointers |= {
        name: f"tensordesc<{dtype}{list(block)}>" for name, block in launch.descriptors.items()
    }
    return {
        name: pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in launch.kernel.arg_names
    }


def compile_kernel(spec: KernelSpec, launch: Launch, target: str) -> Resources:
    """Compile one kernel of a spec for a target such as `sm_90`.

    Raises `OptionError` for a target that is not in `GPUS`.
    """
    absent = {
        "bias_ptr": not spec.bias,
        "up_ptr": not spec.split,
        "learned_ptr": not spec.learned,
        **dict.fromkeys(("slots_ptr", "shared_ptr", "scale_ptr"), True),
    }
    types = {
        name: kind for name, kind in argument_types(spec, launch).items() if not absent.get(name)
    }
    return _compile(launch, types, target)


def compile_router(spec: RouterSpec, launch: Launch, target: str) -> Resources:
    """Compile the kernel of a router likewise; logits have the scores' dtype."""
    pointers = {
        "logits_ptr": _TRITON_TYPE[spec.dtype],
        "weights_ptr": _TRITON_TYPE[spec.weights_dtype],
        "bias_ptr": "fp32",
        "ids_ptr": "i64",
    }
    given = [name for name in launch.kernel.arg_names if spec.bias or name != "bias_ptr"]
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in given}
    return _compile(launch, types, target)


def _compile(launch: Launch, types: Mapping[str, str], target: str) -> Resources:
    """Compile with run-time arguments of these types; others are constants, or not there."""
    device = gpu(target)
    compiler: Any = import_module("triton.compiler")
    backends: Any = import_module("triton.backends.compiler")
    names: list[str] = launch.kernel.arg_names
    constants = dict(launch.constants)
    constants |= {name: None for name in names if name not in types and name not in constants}
    source = compiler.ASTSource(
        fn=launch.kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Allocators align tensors, and the launcher specialises on it.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and types[name].startswith("*")
        },
    )
    backend, arch = ("hip", target) if device.is_amd else ("cuda", int(target[3:]))
    binary = compiler.compile(
        source,
        target=backends.GPUTarget(backend, arch, device.warp_size),
        options=launch.options,
    )
    if device.is_amd:
        text = binary.asm["amdgcn"]
        registers, spilled = (_amd_usage(text, key) for key in ("vgpr_count", "vgpr_spill_count"))
    else:
        text = _tool("nvdisasm", binary.asm["cubin"], "-c")
        registers, spilled = _usage(binary.asm["cubin"])
    code = machine_code.parse(text)
    return Resources(
        kernel=str(launch),
        target=target,
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        warps=binary.metadata.num_warps,
        instructions=code.counts(),
        loop=code.hot_loop(),
    )


def _tool(name: str, cubin: bytes, *options: str) -> str:
    triton: Any = import_module("triton")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> tuple[int, int]:
    """Read registers, and stack plus local bytes, per thread."""
    found = _USAGE.search(_tool("cuobjdump", cubin, "--dump-resource-usage"))
    assert found, "cuobjdump did not report resource usage"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_usage(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", text)
    assert found, f"the assembly does not say its {key}"
    return int(found[1])
