"""Load what a MODEL argument of the command line names."""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from moecc.checkpoint.configuration import (
    import_transformers,
    model_class,
    naming,
    on_meta,
    read_config,
)
from moecc.checkpoint.folders import CONFIGURATION, find_folder, near, near_path
from moecc.fold_layers import Folded, fold_layers
from moecc.model_forms import Form, form_of
from moecc.runtime.errors import ModelError
from moecc.tiny import default_model, tiny_model
from moecc.weightless import without_weights

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
    context: AbstractContextManager[Any] = field(default_factory=nullcontext[None])
    """In which the model is called: a mode of fake tensors where it has no weights."""
    folded: tuple[Folded, ...] = ()
    """Stacks of layers that were cut."""


def load_model(name: str, dtype: str = "auto") -> Loaded:
    """Load a MODEL of the command line with its weights; a model type is tiny and random.

    A factory takes nothing and returns a module, or a module and a tuple of inputs.
    Raises `ModelError` saying what was tried, `MissingExtra` without transformers.
    """
    _check_dtype(dtype)
    match form_of(name):
        case Form.FACTORY:
            return _from_factory(name)
        case Form.TYPE:
            kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            return _loaded(name, tiny_model(name, kind))
        case Form.PACKED | Form.GGUF as form:
            raise ModelError(f"{name!r} is a {form}, which moecc.load reads; transformers does not")
        case _:
            return _from_checkpoint(name, dtype)


def sketch_model(
    name: str,
    dtype: str = "auto",
    full: bool = False,
    all_layers: bool = False,
    weights: bool = False,
) -> Loaded:
    """Make a MODEL to be looked at: what has a configuration gets no weights, whatever its size.

    A model type is a tiny instance with weights, or with `full` its default configuration without.
    A factory gives what it gives. Without weights, layers like others are left out unless
    `all_layers`. With `weights` a checkpoint's are loaded. Raises what `load_model` does.
    """
    _check_dtype(dtype)
    form = form_of(name)
    loads = {Form.FACTORY: True, Form.TYPE: not full}
    if loads.get(form, weights):
        return load_model(name, dtype)
    model = skeleton(name, dtype)
    folded = () if all_layers else fold_layers(model)
    mode = without_weights(model)
    with mode:
        return _loaded(name, model, context=mode, folded=folded)


def skeleton(name: str, dtype: str = "auto") -> nn.Module:
    """Make a MODEL on the meta device, in eval mode; of a hub id only the configuration is fetched.

    A model type is its default configuration, in bfloat16 as models are published. Raises what
    `load_model` does.
    """
    _check_dtype(dtype)
    match form_of(name):
        case Form.FACTORY:
            model = _from_factory(name).model.to("meta")
        case Form.TYPE:
            model = on_meta(*default_model(name), "bfloat16" if dtype == "auto" else dtype)
        case _:
            folder = find_folder(name, CONFIGURATION)
            config = read_config(folder)
            with naming(folder):
                model = on_meta(model_class(config), config, dtype)
    return model.eval()


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {list(DTYPES)}")


def _loaded(name: str, model: nn.Module, tokenizer: Any = None, **more: Any) -> Loaded:
    inputs = _token_inputs(model)
    return Loaded(name=name, model=model, tokenizer=tokenizer, inputs=inputs, **more)


def _from_checkpoint(name: str, dtype: str) -> Loaded:
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot load {name!r} with transformers: {reason}{near_path(name)}"
        ) from error
    return _loaded(name, model.eval(), load_tokenizer(name))


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


def _from_factory(name: str) -> Loaded:
    path, _, factory = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"there is no file {path!r} (from MODEL {name!r}){near_path(path)}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[], Any] | None = getattr(module, factory, None)
    if make is None:
        hint = near(factory, vars(module))
        raise ModelError(f"{path!r} has no {factory!r}; MODEL is file.py:factory{hint}")
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
