"""Load a transformers model and leave its experts where they are.

The model is made by `from_pretrained`, with a class of its own for that time: right after the
modules are made, on the meta device, experts lose their matrices. transformers then neither reads
nor initialises them, and everything else is loaded as always.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecc.checkpoint.coded import Coded, coded_parts
from moecc.checkpoint.configuration import (
    import_transformers,
    model_class,
    naming,
    on_meta,
    read_config,
)
from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.sources import read_tensor
from moecc.checkpoint.weights import Weights
from moecc.records import note
from moecc.runtime.errors import ModelError, StoreError
from moecc.runtime.modules import named_modules, parameters_of

_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """The experts of one block, which the model was loaded without."""

    path: str
    """Of the module."""
    module: nn.Module
    names: tuple[str, str]
    """Of its parameters: the first product's and the second's."""
    tensors: tuple[torch.Tensor, torch.Tensor]
    """These as meta tensors: [E, rows, H] and [E, H, I], or input-major."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters' full names."""
        return tuple(f"{self.path}.{name}" for name in self.names)


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    *,
    weights: Weights | None = None,
    with_experts: bool = False,
) -> tuple[nn.Module, tuple[Absent, ...]]:
    """Load everything but the matrices of experts, and say which are absent.

    Weights in codes are dequantized; `weights` says which those of the folder are. Raises
    `ModelError` when transformers cannot load the folder, `MissingExtra` without it.
    """
    transformers = import_transformers()
    absent: list[Absent] = []
    own = None if weights is None else weights.config
    with naming(folder):
        config = read_config(folder) if own is None else own
        kind = model_class(config)
        loader = kind if with_experts else _class_without_experts(kind, absent)
        with _no_progress_bar(transformers):
            if weights is None or not weights.coded:
                model: Any = loader.from_pretrained(folder, config=config, dtype=dtype)
            else:
                model = _load_coded(transformers, loader, folder, config, dtype, weights)
    model.__class__ = kind
    return model, tuple(absent)


def _load_coded(
    transformers: Any, loader: Any, folder: Path, config: Any, dtype: Any, weights: Weights
) -> Any:
    """Load weights that transformers would hand to a quantizer, which may need a GPU or a library.

    They are read one by one, when their place in the model is known.
    """
    config.__dict__.pop("quantization_config", None)
    unread = {name: _Unread(piece) for name, piece in weights.pieces.items()}
    model, found = loader.from_pretrained(
        None,
        config=config,
        dtype=config.dtype or torch.float32 if dtype == "auto" else dtype,
        state_dict=unread,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise StoreError(f"{str(folder)!r} has nothing for {sorted(found['missing_keys'])}")
    read = [one.piece for one in unread.values() if one.was_read]
    count = sum(any(isinstance(part, Coded) for part in coded_parts(piece)) for piece in read)
    if count:
        name = str(model.dtype).removeprefix("torch.")
        note(
            model, f"{count} {weights.method} weights outside of experts are dequantized to {name}"
        )
    model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


@dataclass(slots=True)
class _Unread:
    """What transformers takes for a slice of a file: indexed, it is read."""

    piece: Piece
    was_read: bool = False

    def __getitem__(self, index: object) -> torch.Tensor:
        self.was_read = True
        return self.piece.read(read_tensor)


def make_skeleton(
    folder: Path, dtype: torch.dtype | str, config: Any = None
) -> tuple[nn.Module, tuple[Absent, ...]]:
    """Make a folder's model without any weights, on the meta device.

    `config` is its configuration where that is not a file of its own. Raises what `load_model`
    does, and `ModelError` when there are no experts.
    """
    with naming(folder):
        config = config or read_config(folder)
        model = on_meta(model_class(config), config, dtype)
    absent = tuple(take_out(model))
    if not absent:
        raise ModelError(f"{str(folder)!r} has no experts that moecc can read one by one")
    return model, absent


def _class_without_experts(kind: Any, absent: list[Absent]) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        absent[:] = take_out(self)

    ignored = [*(getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()), r"\bexperts\."]
    body = {
        "__init__": init,
        "__module__": kind.__module__,
        "_keys_to_ignore_on_load_unexpected": ignored,
    }
    return type(kind.__name__, (kind,), body)


def take_out(model: nn.Module) -> Sequence[Absent]:
    """Take the matrices of experts out of a model on the meta device."""
    found: list[Absent] = []
    for path, module in named_modules(model):
        if not all(hasattr(module, name) for name in _ATTRIBUTES):
            continue
        names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
        own = parameters_of(module)
        taken = [own.get(name) for name in names]
        if not all(one is not None and one.dim() == 3 for one in taken):
            continue  # quantized in a way of its own
        for name in names:
            del own[name]
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        first, second = (one.data for one in taken if one is not None)
        found.append(Absent(path=path, module=module, names=names, tensors=(first, second)))
    return found


@contextmanager
def _no_progress_bar(transformers: Any) -> Generator[None]:
    logging = transformers.utils.logging
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
