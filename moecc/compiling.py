"""Compile a model for every shape: `moecc.compile(model)`, over `torch.compile`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

Model = TypeVar("Model", bound=Callable[..., Any])


def compile(
    model: Model,
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    fullgraph: bool = False,
) -> Model:
    """Compile a model or a function with sizes as symbols from the first call on.

    A module is compiled in place and given back, so that its own `generate` runs compiled too; of
    one that torch.compile has wrapped, the module inside is. Of a function the compiled one is
    given. One graph then serves prompts of every length and one decodes, in whatever order lengths
    come. A size of 1 is torch's own exception: what it is 1 in is compiled apart, a batch of one
    and a single token among that. Floats are constants: another value compiles anew, unless it is
    given as a tensor.

    `options` are those of `moecc.Options`, the rest are torch.compile's. Raises `OptionError`.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's; Dynamo would keep its backend
    asked: dict[str, Any] = {"backend": "moecc", "dynamic": True, "fullgraph": fullgraph}
    asked |= {"mode": mode, "options": None if options is None else {**options}}
    if not isinstance(model, nn.Module):
        return torch.compile(model, **asked)
    model.compile(**asked)
    return cast(Model, model)
