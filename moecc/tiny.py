"""Make a tiny random instance of any transformers model type, to look at or to test with.

Only sizes are set, by the names that configurations use for them (`moecc.tiny_families`); the
architecture stays the model type's own. Of a vision-language family the text model is made.
"""

import dataclasses
import importlib
import inspect
import re
from typing import Any

import torch
from torch import nn

from moecc.checkpoint.configuration import import_transformers
from moecc.checkpoint.folders import near
from moecc.runtime.errors import ModelError
from moecc.tiny_families import CLASSES, EXCEPTIONS, FAMILIES, MODEL_TYPES, SIZES

_AUTO = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_MAPPING")
"""Where transformers keeps the class of a configuration, the most useful kind first."""
_MOST_PARAMETERS = 10_000_000
"""40 MB of float32: more means that a configuration has a size which SIZES does not know."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Make the configuration, the text model's where there are several.

    Raises `ModelError` for an unknown model type, `MissingExtra` without transformers.
    """
    kind = _config_class(model_type)
    sizes = {name: value for name, value in SIZES.items() if name in _settings(kind)}
    return kind(**sizes | EXCEPTIONS.get(model_type, {}) | changes)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> nn.Module:
    """Make a model of a few layers with random weights, in eval mode.

    Raises `ModelError` for a model type that is unknown, has no model, or would not be tiny.
    """
    config = tiny_config(model_type, **changes)
    kind = _model_class(model_type, config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ModelError(
            f"{model_type!r} would have {size:,} parameters; name the size that makes it so in "
            "moecc/tiny_families.py"
        )
    torch.manual_seed(seed)
    model: nn.Module = kind._from_config(config, dtype=dtype)
    with torch.no_grad():
        _widen(model)
        _randomise(model)
    return model.eval()


def default_model(model_type: str) -> tuple[Any, Any]:
    """Give the class of a model type, and the configuration that transformers has for it.

    Raises what `tiny_config` does.
    """
    config = _config_class(model_type)()
    return _model_class(model_type, config), config


def _config_class(model_type: str) -> Any:
    mapping: Any = import_transformers().CONFIG_MAPPING
    known = MODEL_TYPES.get(model_type, model_type)
    if known not in mapping:
        raise ModelError(
            f"{model_type!r} is no checkpoint, no file.py:factory and no model type that the "
            f"installed transformers knows{near(model_type, [*FAMILIES, *mapping])}"
        )
    whole: Any = mapping[known]
    parts: dict[str, Any] = getattr(whole, "sub_configs", None) or {}
    return parts.get("text_config", whole)


def _settings(kind: Any) -> set[str]:
    """Collect what a configuration can be given; old ones are no dataclasses."""
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters)


def _model_class(model_type: str, config: Any) -> Any:
    if name := CLASSES.get(model_type):
        modeling = type(config).__module__.replace(".configuration_", ".modeling_")
        return getattr(importlib.import_module(modeling), name)
    for auto in _AUTO:
        mapping: Any = getattr(import_transformers(), auto)
        if type(config) in mapping:
            return mapping[type(config)]
    raise ModelError(f"{model_type!r} has no model that transformers' Auto classes know")


def _widen(model: nn.Module) -> None:
    """Hold in float32 what the model type loads in float32, whatever dtype is asked for."""
    names: set[str] = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(re.search(pattern, name) for pattern in names) and tensor.dtype.itemsize < 4:
            tensor.data = tensor.data.float()


def _randomise(model: nn.Module) -> None:
    """Leave nothing uninitialised, and no bias at zero or scale at one: those hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.05)
        elif torch.isfinite(parameter).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        else:
            parameter.zero_()
    config: Any = model.config
    for buffer in model.buffers():
        if buffer.any():
            continue  # a table that the model computed
        if buffer.is_floating_point():
            buffer.normal_(0, 0.05)  # a correction of the router's scores, which training fills
        elif buffer.dim() == 2:  # the experts of each token id, [vocabulary, K]
            scores = torch.rand(len(buffer), config.n_routed_experts)
            buffer.copy_(scores.argsort(dim=-1)[:, : buffer.shape[1]])
