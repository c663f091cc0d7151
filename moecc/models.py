"""Load what a MODEL argument of the command line names."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from moecc.runtime.errors import MissingExtra, ModelError
from moecc.tiny import tiny_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model and what it takes to call it."""

    name: str
    model: nn.Module
    tokenizer: Any
    """None when the model has none."""
    inputs: tuple[Any, ...]
    """Example arguments: two sequences of 16 tokens, or what the factory gave."""


def load_model(name: str, dtype: str = "auto") -> Loaded:
    """Load a checkpoint folder, a hub id, a transformers model type or `file.py:factory`.

    A factory takes nothing and returns a module, or a module and a tuple of inputs.
    Raises `ModelError` saying what was tried, `MissingExtra` without transformers.
    """
    file, _, factory = name.rpartition(":")
    if file.endswith(".py"):
        return _from_factory(name, Path(file), factory)
    if (Path(name) / "config.json").is_file() or "/" in name:
        return _from_checkpoint(name, dtype)
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model = tiny_model(name, kind)
    return Loaded(name=name, model=model, tokenizer=None, inputs=_token_inputs(model))


def _from_checkpoint(name: str, dtype: str) -> Loaded:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtra(
            "checkpoints need transformers: pip install moecc[transformers]"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load {name!r} with transformers: {reason}") from error
    return Loaded(name=name, model=model.eval(), tokenizer=tokenizer, inputs=_token_inputs(model))


def _from_factory(name: str, file: Path, factory: str) -> Loaded:
    if not file.is_file():
        raise ModelError(f"there is no file {str(file)!r} (from MODEL {name!r})")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[], Any] | None = getattr(module, factory, None)
    if make is None:
        raise ModelError(f"{str(file)!r} has no {factory!r}; MODEL is file.py:factory")
    made: Any = make()
    pair = cast(tuple[Any, Any], made if isinstance(made, tuple) else (made, None))
    model, inputs = pair
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return Loaded(
        name=name,
        model=model.eval(),
        tokenizer=None,
        inputs=_token_inputs(model) if inputs is None else tuple(inputs),
    )


def _token_inputs(model: nn.Module) -> tuple[Any, ...]:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        raise ModelError(
            "the model has no config.vocab_size to make token inputs from; let the factory "
            "return (model, inputs)"
        )
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(3, int(size), (2, 16), generator=generator),)
