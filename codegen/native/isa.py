"""Ask the compiler what the CPU that it builds for can do."""

import functools
import os
import shlex
import subprocess

import torch

from moecc.codegen.native.build import FLAGS, find_compiler
from moecc.runtime.errors import BuildError

_ARITHMETIC = {
    torch.bfloat16: {"__AVX512BF16__", "__AMX_BF16__", "__ARM_FEATURE_BF16"},
    torch.float16: {"__AVX512FP16__", "__AMX_FP16__", "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC"},
}
"""What compilers define for CPUs that multiply these dtypes without widening them first."""


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether the CPU, as `-march=native` or `$CXXFLAGS` have it, computes in a 16-bit float.

    Raises `NoCompiler` when there is none to ask, `BuildError` when it does not answer.
    """
    return not _ARITHMETIC[dtype].isdisjoint(
        _macros(find_compiler(), os.environ.get("CXXFLAGS", ""))
    )


_INSTRUCTIONS = (
    "AVX2", "FMA", "AVXVNNI", "AVX512F", "AVX512VNNI", "AVX512BF16", "AVX512FP16", "AMX_INT8",
    "AMX_BF16", "ARM_NEON", "ARM_FEATURE_DOTPROD", "ARM_FEATURE_SVE",
)  # fmt: skip
"""What kernels are faster with, as compilers define it."""


def instructions() -> list[str]:
    """Name those sets of the CPU's instructions that matter; raises as `multiplies` does."""
    known = _macros(find_compiler(), os.environ.get("CXXFLAGS", ""))
    return [name for name in _INSTRUCTIONS if f"__{name}__" in known or f"__{name}" in known]


@functools.cache
def _macros(compiler: tuple[str, ...], flags: str) -> frozenset[str]:
    """Name all macros that are defined before a source begins."""
    command = [*compiler, *FLAGS, *shlex.split(flags), "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed: {result.stderr.strip()}")
    return frozenset(line.split()[1] for line in result.stdout.splitlines())
