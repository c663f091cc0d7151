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

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


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
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {list(DTYPES)}")
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
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load {name!r} with transformers: {reason}") from error
    inputs = _token_inputs(model)
    return Loaded(name=name, model=model.eval(), tokenizer=load_tokenizer(name), inputs=inputs)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a checkpoint folder or hub id.

    Raises `ModelError` when it has none.
    """
    transformers: Any = importlib.import_module("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load the tokenizer of {name!r}: {reason}") from error


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
    try:
        made: Any = make()
    except Exception as error:  # whatever a user's own code raises
        raise ModelError(f"{name!r} failed: {type(error).__name__}: {error}") from error
    model, inputs = _split(made)
    if type(inputs) not in (list, tuple, type(None)):
        raise ModelError(f"{name!r} returned inputs that are no list or tuple of arguments")
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return Loaded(
        name=name,
        model=model.eval(),
        tokenizer=None,
        inputs=_token_inputs(model) if inputs is None else tuple(inputs),
    )


def _split(made: Any) -> tuple[Any, Any]:
    """Tell a factory's model from the inputs that it may give with it."""
    if not isinstance(made, tuple):
        return made, None
    parts = cast("tuple[Any, ...]", made)
    return (parts[0], parts[1]) if len(parts) == 2 else (parts, None)


def _token_inputs(model: nn.Module) -> tuple[Any, ...]:
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if size is None:
        raise ModelError(
            "the model has no config.vocab_size to make token inputs from; let the factory "
            "return (model, inputs)"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, int(size), (2, 16), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        return tokens, None, tokens[:, :4]  # input_ids, attention_mask, decoder_input_ids
    return (tokens,)
