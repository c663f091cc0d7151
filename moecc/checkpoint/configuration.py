"""Make a model of a configuration, without any weights: shapes and dtypes on the meta device.

Only classes of the installed transformers are used; code that a checkpoint brings is never run.
"""

import importlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from moecc.checkpoint.folders import is_gguf
from moecc.checkpoint.gguf import read_gguf
from moecc.runtime.errors import MissingExtra, ModelError


def read_config(folder: Path) -> Any:
    """Read the configuration of a checkpoint folder or GGUF file.

    A model type that transformers does not know (Kimi-K2's) is read as its architecture's, which it
    may know. Raises `ModelError` saying what is missing, `MissingExtra` without transformers.
    """
    if is_gguf(folder):
        return read_gguf(folder)[0]
    transformers = import_transformers()
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"cannot load {str(folder)!r}: it has no config.json")
    with naming(folder):
        settings: Any = json.loads(file.read_text())
        if not isinstance(settings, dict):
            raise ModelError(f"{str(file)!r} is not a model's configuration")
        settings = cast("dict[str, Any]", settings)
        if settings.get("model_type") in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in settings.get("architectures") or ():
            if kind := getattr(transformers, name, None):
                settings.pop("model_type", None)
                return kind.config_class.from_dict(settings)
    raise ModelError(
        f"{str(file)!r} has model_type {settings.get('model_type')!r} and architectures "
        f"{settings.get('architectures')}, and transformers {transformers.__version__} knows "
        "neither: upgrade it, or give file.py:factory"
    )


def model_class(config: Any) -> Any:
    """Give the class that a checkpoint with this configuration was saved from."""
    transformers = import_transformers()
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in known:
        return known[type(config)]
    raise ModelError(f"transformers has no class for architectures {config.architectures}")


def on_meta(kind: Any, config: Any, dtype: torch.dtype | str) -> nn.Module:
    """Make a model without weights; "auto" is the dtype of its configuration."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    wanted = wanted or getattr(config, "dtype", None) or torch.get_default_dtype()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(wanted)
        with torch.device("meta"):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def import_transformers() -> Any:
    """Import transformers; raises `MissingExtra` when it is not there."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtra(
            "checkpoints and model types need transformers: pip install moecc[transformers]"
        ) from error


@contextmanager
def naming(folder: Path) -> Generator[None]:
    """Say which folder it was that transformers could not make a model of."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load {str(folder)!r} with transformers: {reason}") from error
