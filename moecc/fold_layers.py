"""Leave out layers that are like earlier ones, so that a deep model is traced in seconds.

    61 layers, 3 dense and 58 sparse  →  0 1 2 3 4; layers 5 to 60 are like layer 4

What stays is a prefix: models look masks and caches up by a layer's number. One layer more stays
than there are kinds, so that what passes do between two blocks can be seen.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from moecc.runtime.modules import named_modules

_FEW = 8
"""Layers that are traced as they are."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A stack of layers that was cut."""

    path: str
    kept: int
    like: tuple[int, ...]
    """For each layer that was left out, one that was kept."""

    @property
    def total(self) -> int:
        """Layers of the whole stack."""
        return self.kept + len(self.like)

    def __str__(self) -> str:
        """Say what was left out."""
        return (
            f"{self.path}: {self.kept} of {self.total} layers were traced, the others are like "
            "these (--all-layers traces all)"
        )

    def traced(self, path: str) -> str:
        """Give the path in a layer that was kept, of one in a layer like it."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)\b", path)
        if found is None or not self.kept <= int(found[1]) < self.total:
            return path
        return f"{self.path}.{self.like[int(found[1]) - self.kept]}{path[found.end() :]}"

    def alike(self, path: str) -> list[str]:
        """Give the same path in every layer like its own that was left out."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)\b", path)
        rest = path[found.end() :] if found else ""
        return [
            f"{self.path}.{self.kept + number}{rest}"
            for number, one in enumerate(self.like)
            if found and one == int(found[1])
        ]


def fold_layers(model: nn.Module) -> tuple[Folded, ...]:
    """Cut every long stack of layers of a model behind the first of each kind, and one more."""
    found: list[Folded] = []
    for path, stack in named_modules(model):
        if isinstance(stack, nn.ModuleList) and len(stack) > _FEW:
            kinds = _kinds(list(stack))
            kept = max(kinds.index(kind) for kind in kinds) + 2
            if kept < len(stack):
                last = {kind: number for number, kind in enumerate(kinds[:kept])}
                like = tuple(last[kind] for kind in kinds[kept:])
                found.append(Folded(path=path, kept=kept, like=like))
                del stack[kept:]
    return tuple(found)


def _kinds(layers: list[nn.Module]) -> list[object]:
    """Describe each layer by all that may differ: modules, shapes, plain attributes."""
    known = [_attributes(layer) for layer in layers]
    numbers = {
        name
        for name in known[0]
        if all(one.get(name) == number for number, one in enumerate(known))
    }  # such as layer_idx
    return [
        frozenset((name, value) for name, value in one.items() if name not in numbers)
        for one in known
    ]


def _attributes(layer: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, module in named_modules(layer):
        found[path] = type(module)
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN):
                found[f"{path}.{name}"] = value
    for name, tensor in layer.state_dict(keep_vars=True).items():
        assert isinstance(tensor, torch.Tensor)
        found[f"{name}:"] = (tensor.shape, tensor.dtype)
    return found
