"""Compile Triton kernels for a GPU that is not there, and read what they use.

Triton's wheel brings ptxas and the CUDA binary tools, so neither a driver nor a CUDA toolkit is
needed. The numbers are those of the machine code that the GPU would run; how fast it would run is
not among them.
"""

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_launches import Launch, plan_launches
from moecc.runtime.errors import OptionError

SHARED_LIMIT: Mapping[str, int] = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
"""Bytes of shared memory that one block may use (CUDA programming guide, compute capabilities).

Triton checks this when it loads a kernel, not when it compiles one."""

_TRITON_TYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TELLING = ("64", "128", "NAN")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)")


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

    @property
    def fits(self) -> bool:
        """Tell whether a block gets the shared memory it asks for."""
        return self.shared <= SHARED_LIMIT[self.target]


def argument_types(spec: KernelSpec, arguments: list[str]) -> dict[str, str]:
    """Name the Triton type of each run-time argument; hidden states have the weights' dtype."""
    dtype = _TRITON_TYPE[spec.dtype]
    pointers = {
        "ids_ptr": "*i64",
        "weights_ptr": "*fp32",
        **dict.fromkeys(
            ("order_ptr", "tiles_ptr", "counts_ptr", "before_ptr", "totals_ptr"), "*i32"
        ),
    }
    return {
        name: pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in arguments
    }


def compile_kernel(spec: KernelSpec, launch: Launch, target: str) -> Resources:
    """Compile one kernel of a spec for a target such as `sm_90`.

    Raises `OptionError` for a target that is not in `SHARED_LIMIT`.
    """
    if target not in SHARED_LIMIT:
        raise OptionError(f"target {target!r} is not one of {', '.join(SHARED_LIMIT)}")
    compiler: Any = import_module("triton.compiler")
    backends: Any = import_module("triton.backends.compiler")
    names: list[str] = launch.kernel.arg_names
    constants: dict[str, Any] = dict(launch.constants)
    absent = {"bias_ptr": not spec.bias, "up_ptr": not spec.split}
    constants |= {name: None for name in names if absent.get(name)}
    types = argument_types(spec, names)
    source = compiler.ASTSource(
        fn=launch.kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Allocators align tensors, and the launcher specialises on it.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name.endswith("_ptr") and name not in constants
        },
    )
    binary = compiler.compile(
        source,
        target=backends.GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    registers, spilled = _usage(binary.asm["cubin"])
    return Resources(
        kernel=str(launch),
        target=target,
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        warps=binary.metadata.num_warps,
        instructions=_instructions(binary.asm["cubin"]),
    )


def compile_spec(spec: KernelSpec, target: str) -> list[Resources]:
    """Compile every kernel that the emitter may run for a spec."""
    return [compile_kernel(spec, launch, target) for launch in plan_launches(spec).every()]


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


def _instructions(cubin: bytes) -> dict[str, int]:
    """Count opcodes, and again with the modifiers that change what they mean: `LDG.128`."""
    counts: collections.Counter[str] = collections.Counter()
    for name, modifiers in _OPCODE.findall(_tool("nvdisasm", cubin, "-c")):
        counts[name] += 1
        counts.update(f"{name}.{part}" for part in modifiers.split(".") if part in _TELLING)
    return dict(counts)
