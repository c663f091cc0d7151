"""Time contenders against each other on one machine, in one run."""

import os
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.harness.machine import commit, now
from moecc.measuring import (
    PRODUCT,
    alternate,
    machine,
    plain_product,
    plain_read,
    product_rate,
    read_bandwidth,
    take_turns,
)

__all__ = [
    "PRODUCT",
    "alternate",
    "machine",
    "narrow_to",
    "plain_product",
    "plain_read",
    "product_rate",
    "read_bandwidth",
    "stamp",
    "table",
    "take_turns",
]

_NARROWED = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CXXFLAGS": "-march=haswell",
        "KT_KERNEL_CPU_VARIANT": "avx2",
        # inductor's graph cache does not tell instruction sets apart; a hit from another crashes.
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/inductor-avx2-{os.getuid()}",
    }
}


def narrow_to(isa: str | None) -> None:
    """Start this program again with torch, oneDNN, MKL and our own builds held to `isa`."""
    if isa is None or os.environ.get("ATEN_CPU_CAPABILITY") == isa:
        return
    environment = {**os.environ, **_NARROWED[isa]}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def stamp() -> dict[str, str]:
    """Give what every record says of itself: machine, date and commit."""
    return {"machine": machine(), "date": now(), "commit": commit()}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
