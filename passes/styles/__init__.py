"""Recognise the ways of writing a MoE block, one a file.

A style says where to look (`anchor`, the name of the block's last node) and what has to be there:
a `Style` with patterns of calls that bind the block's inputs, a `ProductStyle` with products over
axes, a `DispatchStyle` with buffers that tokens are copied into. The docstring of a style's file
shows the source it recognises.
"""

from moecc.passes.styles import (
    batched_mm,
    canonical,
    capacity,
    dense_gates,
    gated_input,
    gathered,
    grouped_mm,
    sorted_rows,
)
from moecc.passes.styles.style import DispatchStyle, ProductStyle, Style

STYLES: tuple[Style, ...] = (canonical.STYLE, grouped_mm.STYLE, batched_mm.STYLE)
DISPATCH_STYLES: tuple[DispatchStyle, ...] = (capacity.STYLE,)
PRODUCT_STYLES: tuple[ProductStyle, ...] = (
    gathered.STYLE,
    sorted_rows.STYLE,
    dense_gates.STYLE,
    gated_input.STYLE,
)
