"""Recognise the ways of writing a MoE block, one a file.

A style says where to look (`anchor`, the name of the block's last node) and what has to be there
(`output` and `first`, patterns that bind the block's inputs). The docstring of its file shows the
source it recognises.
"""

from moecc.passes.styles import batched_mm, canonical, grouped_mm
from moecc.passes.styles.style import Style

STYLES: tuple[Style, ...] = (canonical.STYLE, grouped_mm.STYLE, batched_mm.STYLE)
