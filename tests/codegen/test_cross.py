"""Native kernels for CPUs that are not here: compiled for them, and not run."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moecc.codegen.native import attention, linear
from moecc.codegen.native.emit import write
from tests.codegen.native_cases import DTYPES, STYLES, make_spec
from tests.codegen.test_quantized import KINDS, low_bit

ARM = "aarch64-linux-gnu-g++"
SPECS = {
    **{f"{style}-{dtype}": make_spec(style, dtype) for style in STYLES for dtype in DTYPES},
    **{str(kind): low_bit("silu", kind, torch.float32, 64, 64) for kind in KINDS},
}
SOURCES = {name: write(spec) for name, spec in SPECS.items()}
SOURCES |= {f"linear-{dtype}": linear.write(dtype) for dtype in linear.DTYPES}
SOURCES |= {f"linear-{kind}": linear.write(torch.bfloat16, kind) for kind in KINDS[:1]}


SOURCES |= {f"attention-{dtype}": attention.write(dtype) for dtype in DTYPES}


@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"needs {ARM}")
@pytest.mark.parametrize("name", SOURCES)
def test_compiles_for_arm(name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(SOURCES[name])
    flags = ["-std=c++17", "-march=armv8.2-a", "-Wall", "-Werror", "-fopenmp", "-fsyntax-only"]
    done = subprocess.run([ARM, *flags, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
