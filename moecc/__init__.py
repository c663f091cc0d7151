"""moecc: a torch.compile backend for mixture-of-experts models.

model = torch.compile(model, backend="moecc")
print(moecc.report(model))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecc.balancing import balance
    from moecc.compiling import compile
    from moecc.loading import load
    from moecc.offloading import offload
    from moecc.passes.options import Options
    from moecc.reporting import Report, report
    from moecc.runtime.errors import MoeccError
    from moecc.speculation.speculate import speculate

__version__ = "0.1.0"
__all__ = [
    "MoeccError",
    "Options",
    "Report",
    "balance",
    "compile",
    "load",
    "offload",
    "report",
    "speculate",
]

_HOMES = {
    "MoeccError": ("moecc.runtime.errors", "MoeccError"),
    "Options": ("moecc.passes.options", "Options"),
    "Report": ("moecc.reporting", "Report"),
    "balance": ("moecc.balancing", "balance"),
    "compile": ("moecc.compiling", "compile"),
    "load": ("moecc.loading", "load"),
    "offload": ("moecc.offloading", "offload"),
    "report": ("moecc.reporting", "report"),
    "speculate": ("moecc.speculation.speculate", "speculate"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import moecc` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moecc' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
