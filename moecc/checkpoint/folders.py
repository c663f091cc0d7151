"""Find the folder of a checkpoint."""

import importlib
from pathlib import Path
from typing import Any

from moecc.runtime.errors import ModelError


def find_folder(name: str) -> Path:
    """Find a checkpoint folder or GGUF file, from the hub if it is not one here.

    Raises `ModelError` when there is neither.
    """
    if Path(name).is_dir() or is_gguf(Path(name)):
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ModelError(f"there is no checkpoint folder {name!r}, and it is no hub id")
    hub: Any = importlib.import_module("huggingface_hub")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, network errors
        raise ModelError(f"cannot download {name!r}: {type(error).__name__}: {error}") from error


def is_gguf(path: Path) -> bool:
    """Tell whether a checkpoint is a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()
