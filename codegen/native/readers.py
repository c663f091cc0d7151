"""Build the queue of a link's reader threads: `readers.cpp`, called by `runtime/offload`."""

import ctypes
from pathlib import Path

from moecc.codegen.native.build import load

SOURCE = Path(__file__).with_name("readers.cpp")


def load_readers() -> ctypes.CDLL:
    """Load it; raises `NoCompiler` when nothing can build it, `BuildError` when the build fails."""
    return load(SOURCE.read_text())
