"""Tell what a MODEL argument of the command line names: one of six forms."""

from enum import StrEnum
from pathlib import Path

from moecc.checkpoint.folders import find_folder, is_gguf, is_hub_id, near_path
from moecc.checkpoint.packed import is_packed
from moecc.runtime.errors import ModelError


class Form(StrEnum):
    """What a MODEL can be; the value is what messages call it."""

    CHECKPOINT = "checkpoint folder"
    PACKED = "packed store"
    GGUF = "GGUF file"
    HUB = "hub id"
    TYPE = "model type"
    FACTORY = "file.py:factory"


ON_DISK = (Form.CHECKPOINT, Form.PACKED, Form.GGUF, Form.HUB)
"""Forms that come with a configuration and weights of their own."""


def form_of(name: str) -> Form:
    """Tell the form of a MODEL; what is no path is a model type, known or not.

    Raises `ModelError` with near names for a path that is not there, or a folder without a model.
    """
    path = Path(name)
    if name.rpartition(":")[0].endswith(".py"):
        return Form.FACTORY
    if is_gguf(path):
        return Form.GGUF
    if path.is_dir() and is_packed(path):
        return Form.PACKED
    if (path / "config.json").is_file():
        return Form.CHECKPOINT
    if path.is_dir() and any(path.glob("*.safetensors")):
        raise ModelError(f"the folder {name!r} has weights and no config.json; copy it there, too")
    if "/" not in name and path.suffix not in (".py", ".gguf"):
        return Form.TYPE
    if path.is_dir():
        raise ModelError(f"the folder {name!r} holds no model: it has no config.json")
    if path.is_file():
        hint = f"; name what makes the model: {name}:factory" if path.suffix == ".py" else ""
        raise ModelError(f"the file {name!r} is no model{hint}")
    if is_hub_id(name):
        return Form.HUB
    raise ModelError(f"there is nothing at {name!r}{near_path(name)}")


def find_weights_of(name: str) -> Path:
    """Find the checkpoint folder, packed store or GGUF file that a MODEL names, or download it.

    Raises `ModelError` for forms without weights on disk.
    """
    form = form_of(name)
    if form not in ON_DISK:
        raise ModelError(
            f"{name!r} is a {form}, which has no tokenizer and no weights on disk; give a "
            "checkpoint folder, a packed store, a GGUF file or a hub id such as org/name"
        )
    return find_folder(name)
