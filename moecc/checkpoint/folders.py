"""Find the folder of a checkpoint."""

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moecc.runtime.errors import ModelError

_EVERYTHING = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONFIGURATION = ("*.json",)
"""What a model is made of without its weights."""


def find_folder(name: str, patterns: Iterable[str] = _EVERYTHING) -> Path:
    """Find a checkpoint folder or GGUF file, from the hub if it is not one here.

    Of the hub's files, those that match `patterns` are downloaded. Raises `ModelError` when there
    is neither.
    """
    if Path(name).is_dir() or is_gguf(Path(name)):
        return Path(name)
    if not is_hub_id(name):
        raise ModelError(
            f"there is no checkpoint folder {name!r}, and it is no hub id{near_path(name)}"
        )
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's own errors, network errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"cannot download {name!r}: {reason}{near_path(name)}") from error


def is_gguf(path: Path) -> bool:
    """Tell whether a checkpoint is a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def is_hub_id(name: str) -> bool:
    """Tell whether a name that is no path here can be one of the hub, `org/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def near(name: str, known: Iterable[str]) -> str:
    """Ask whether a known name was meant, as the end of a message; nothing where none is near."""
    found = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def near_path(name: str) -> str:
    """Ask whether something beside a path that is not there was meant."""
    folder = Path(name).parent
    return near(name, map(str, folder.iterdir())) if folder.is_dir() else ""
