"""Look at the C++ compiler, OpenMP and the CPU's instructions, which native kernels need."""

import shlex
import subprocess
from collections.abc import Iterator

import torch

from moecc.codegen.native.build import find_compiler, openmp_threads
from moecc.codegen.native.isa import instructions, multiplies
from moecc.doctor.check import Check, limited, ok
from moecc.runtime.errors import BuildError, NoCompiler

_HALVES = (torch.bfloat16, torch.float16)
_VECTORS = ("AVX512F", "AVX2", "ARM_NEON")


def compiler() -> Iterator[Check]:
    """Check that kernels can be built, and with which instructions."""
    try:
        command = find_compiler()
        known = instructions()
    except (NoCompiler, BuildError) as error:
        fix = "install g++ (Debian: apt install g++; Fedora: dnf install gcc-c++), or set CXX"
        yield limited("C++ compiler", f"{error}; torch's operators run instead", fix)
        return
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    yield ok("C++ compiler", f"{shlex.join(command)}: {told.stdout.partition(chr(10))[0]}")
    threads, wanted = openmp_threads(), torch.get_num_threads()
    if threads < wanted:
        fix = "unset OMP_NUM_THREADS, or set it to the number of cores"
        yield limited("OpenMP", f"{threads} threads, and torch has {wanted}", fix)
    else:
        yield ok("OpenMP", f"{threads} threads, torch has {wanted}")
    direct = [str(one).removeprefix("torch.") for one in _HALVES if multiplies(one)]
    about = (
        f"{', '.join(known) or 'no vectors'}; {' and '.join(direct) or 'no 16-bit float'} direct"
    )
    if any(one in known for one in _VECTORS):
        yield ok("instructions", f"{about}; torch uses {torch.backends.cpu.get_cpu_capability()}")
    else:
        fix = "leave -march out of CXXFLAGS; on a CPU without AVX2 or NEON kernels stay slow"
        yield limited("instructions", about, fix)
