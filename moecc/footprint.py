"""Say how many bytes of weights a token reads beside those of experts."""

from torch import nn

from moecc.runtime.modules import named_modules, parameters_of


def other_bytes(model: nn.Module, besides: frozenset[int] = frozenset()) -> int:
    """Add up parameters that are no experts: neither stand-ins nor with ids in `besides`.

    Of an embedding a token reads a row, so it counts only where it is the output's matrix, too.
    """
    sizes: dict[int, int] = {}
    for _, module in named_modules(model):
        for parameter in parameters_of(module).values():
            if parameter is None or isinstance(module, nn.Embedding) or id(parameter) in besides:
                continue
            if parameter.stride()[:1] != (0,):
                sizes[id(parameter)] = parameter.nbytes
    return sum(sizes.values())
