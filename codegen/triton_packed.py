"""Say how a packed matrix lies, as it is baked into the Triton kernels that read it."""

from dataclasses import dataclass

from moecc.runtime.errors import UnsupportedSpec
from moecc.runtime.schemes.packing import ROWS, packed_bytes, panel_bytes, scale_bytes
from moecc.runtime.schemes.scheme import Scheme

READABLE = ("int8", "int4", "mxfp4", "fp8")
_WHOLE_ROW = 1 << 30
"""More columns than a matrix has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The matrices [rows, columns] of a product in a scheme; sizes are in bytes."""

    name: str
    bits: int
    """Of a code."""
    group: int
    """Columns that share a scale."""
    kinds: int
    """2 if each group has a zero beside its scale, else 1."""
    shared_scales: bool
    """The rows of a panel share theirs."""
    rows: int
    columns: int
    """Filled up to whole blocks."""
    scales: int
    """Of a panel: where its codes begin."""
    panel: int
    bytes: int
    """Of a matrix."""


def describe(scheme: Scheme, rows: int, columns: int) -> Packed:
    """Describe a matrix of so many rows and columns.

    Raises `UnsupportedSpec` for a scheme that the Triton kernels do not read.
    """
    if scheme.name not in READABLE:
        raise UnsupportedSpec(f"triton kernels read {', '.join(READABLE)} weights, not {scheme}")
    panel, scales = panel_bytes(columns, scheme), scale_bytes(columns, scheme)
    return Packed(
        name=scheme.name,
        bits=scheme.bits,
        group=scheme.group or _WHOLE_ROW,
        kinds=2 if scheme.zeros else 1,
        shared_scales=scheme.rows > 1,
        rows=rows,
        columns=(panel - scales) * 8 // scheme.bits // ROWS,
        scales=scales,
        panel=panel,
        bytes=packed_bytes(rows, columns, scheme),
    )
