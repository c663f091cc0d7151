"""Look at the versions of what moecc builds on."""

import importlib
import platform
from collections.abc import Iterator

import torch
from torch.torch_version import TorchVersion

from moecc import __version__, capture
from moecc.doctor.check import Check, broken, limited, ok

LEAST = {"torch": "2.9", "triton": "3.5", "transformers": "5.20"}
"""What pyproject.toml asks for."""
_USES = {
    "triton": ("there are no kernels for GPUs", "triton"),
    "transformers": ("no checkpoint and no model type can be loaded", "moecc[transformers]"),
}


def versions() -> Iterator[Check]:
    """Check moecc, Python, torch, triton and transformers, and torch's private names."""
    yield ok("moecc", f"{__version__} on Python {platform.python_version()}, {platform.platform()}")
    yield _version("torch", str(torch.__version__))
    for name, (without, package) in _USES.items():
        try:
            found = str(importlib.import_module(name).__version__)
        except ImportError:
            yield limited(name, f"not installed: {without}", f"pip install '{package}'")
        else:
            yield _version(name, found)
    import moecc.backend  # installs capture

    assert moecc.backend.moecc
    for miss in capture.missing():
        fix = "install the versions that README.md says are tested"
        yield limited("capture", f"{miss.why}; blocks are found by structure alone", fix)


def _version(name: str, found: str) -> Check:
    least = LEAST[name]
    if TorchVersion(found) >= TorchVersion(least):
        return ok(name, found)
    return broken(name, f"{found}, older than {least}", f"pip install -U '{name}>={least}'")
