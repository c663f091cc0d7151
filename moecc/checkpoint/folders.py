"""Find the folder of a checkpoint."""

import importlib
from pathlib import Path
from typing import Any

from moecc.runtime.errors import ModelError


def find_folder(name: str) -> Path:
    """Find a checkpoint folder, from the hub if it is not one here.

    Raises `ModelError` when there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ModelError(f"there is no checkpoint folder {name!r}, and it is no hub id")
    hub: Any = importlib.import_module("huggingface_hub")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, network errors
        raise ModelError(f"cannot download {name!r}: {type(error).__name__}: {error}") from error
