"""Say how many bytes of weights a token reads beside those of experts."""

from torch import nn

from moecc.runtime.modules import named_modules, parameters_of


def other_bytes(model: nn.Module) -> int:
    """Add up parameters that do not stand in for experts.

    Of an embedding a token reads a row, so it counts only where it is the output's matrix, too.
    """
    sizes: dict[int, int] = {}
    for _, module in named_modules(model):
        for parameter in parameters_of(module).values():
            if parameter is None or isinstance(module, nn.Embedding):
                continue
            if parameter.stride()[:1] != (0,):  # a stand-in is one row, seen from everywhere
                sizes[id(parameter)] = parameter.nbytes
    return sum(sizes.values())
