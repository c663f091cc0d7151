"""Look into modules with types: torch leaves these members private or without annotations."""

from typing import Any, cast

from torch import nn


def named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List a module and everything in it, with paths."""
    return list(cast(Any, module).named_modules())


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Give the dictionary in which a module keeps its children."""
    return cast(Any, module)._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Give the dictionary in which a module keeps its own parameters."""
    return cast(Any, module)._parameters


def has_hooks(module: Any) -> bool:
    """Tell whether a call of the module calls something else before or after its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
