"""The reason why a module cannot be observed."""


class Unrecordable(Exception):
    """The forward does something that a recording cannot hold, or is not what was looked for."""

    routes = False
    """The forward chose by scores before it failed: it was meant as a MoE block."""
