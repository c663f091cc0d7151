"""Remember which vector instructions inductor found to work: its probes take seconds a process.

For each instruction set that the CPU has, inductor builds a library and has a child process load
it. That it could be loaded is kept, as an empty file in the folder of our own libraries, under a
digest of all that decides it; what could not be is tried again.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from typing import Any
from unittest.mock import patch

import torch

from moecc.codegen.native.build import cache_folder, cpu_identity


@cache
def find_vector_isa() -> None:
    """Have inductor find the CPU's instruction sets, which it does once a process.

    Where torch lacks one of the names that this leans on, inductor finds them by itself.
    """
    try:
        from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler
        from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list

        probe: Callable[[Any, str], bool] = VecISA.check_build
    except (ImportError, AttributeError):
        return

    def remembered(isa: Any, code: str) -> bool:
        compiler = get_cpp_compiler()
        told = (torch.__version__, torch.__file__, compiler, get_compiler_version_info(compiler))
        parts = (*told, cpu_identity(), isa.build_arch_flags(), code)
        mark = cache_folder() / f"{sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.works"
        if mark.exists():
            return True
        works = probe(isa, code)
        if works:
            mark.touch(mode=0o600)
        return works

    with patch.object(VecISA, "check_build", remembered):
        valid_vec_isa_list()
