"""Recognise what moecc's own capture writes, whatever the model's source looked like.

rows      = moecc.expert_linear(hidden, ids, gate_up, gate_up_bias, transposed)
activated = act(rows)
terms     = moecc.expert_linear(activated, ids, down, down_bias, transposed)
out       = moecc.combine(terms, weights)
"""

from moecc.passes.pattern import bind, call
from moecc.passes.styles.style import Style

STYLE = Style(
    name="canonical",
    anchor="combine",
    output=call(
        "combine",
        call(
            "expert_linear",
            bind("activated"),
            bind("ids"),
            bind("down"),
            bind("down_bias"),
            bind("down_input_major"),
        ),
        bind("weights"),
    ),
    first=call(
        "expert_linear",
        bind("hidden"),
        bind("ids"),
        bind("gate_up"),
        bind("gate_up_bias"),
        bind("gate_up_input_major"),
    ),
    near=1,
)
