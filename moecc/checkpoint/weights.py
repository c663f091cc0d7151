"""Find what a checkpoint folder holds: tensors, and those that stand for weights in codes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moecc.checkpoint.coded import fold
from moecc.checkpoint.files import read_headers, shards
from moecc.checkpoint.folders import is_gguf
from moecc.checkpoint.formats.awq import Awq
from moecc.checkpoint.formats.fp8 import Fp8
from moecc.checkpoint.formats.gptq import Gptq
from moecc.checkpoint.formats.mxfp4 import Mxfp4
from moecc.checkpoint.gguf import read_gguf
from moecc.checkpoint.pieces import Piece, Stored
from moecc.runtime.errors import InputError, ModelError, StoreError
from moecc.runtime.schemes.scheme import Schemes

_FORMATS = {one.method: one.of for one in (Mxfp4, Fp8, Gptq, Awq)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a checkpoint by their names there."""

    pieces: Mapping[str, Piece]
    files: tuple[Path, ...]
    """That they are in."""
    coded: bool = False
    """Some may be codes, which moecc reads."""
    method: str | None = None
    """`quant_method` of the configuration, or `gguf`."""
    config: Any = None
    """The model's configuration where it is not a file of its own."""

    def check_method(self) -> None:
        """Raise `ModelError` for codes that are not read."""
        if self.method is not None and not self.coded:
            raise ModelError(
                f"the checkpoint's quant_method is {self.method!r}, and experts are read from "
                f"{list(_FORMATS)}; load another form of it, or this one with transformers alone"
            )


def find_weights(folder: Path) -> Weights:
    """Look through a folder's headers and configuration.

    `folder` may be a GGUF file. Raises `StoreError` naming file and tensor when one is damaged or
    lacks a part.
    """
    if is_gguf(folder):
        config, pieces = read_gguf(folder)
        return Weights(pieces=pieces, files=(folder,), coded=True, method="gguf", config=config)
    files = tuple(shards(folder))
    tensors = read_headers(files)
    settings = _settings(folder)
    method = None if settings is None else str(settings.get("quant_method"))
    if settings is None or method not in _FORMATS:
        pieces = {name: Stored(one) for name, one in tensors.items()}
        return Weights(pieces=pieces, files=files, method=method)
    coding = _FORMATS[method](settings)
    return Weights(pieces=fold(tensors, coding), files=files, coded=True, method=method)


def kept_by_configuration(folder: Path) -> Schemes | None:
    """Say in what schemes experts keep their codes, by a folder's configuration alone.

    None where weights are plain. Raises `ModelError` for codes that are not read, `StoreError` for
    those that no scheme holds.
    """
    settings = _settings(folder)
    if settings is None:
        return None
    method = str(settings.get("quant_method"))
    Weights(pieces={}, files=(), coded=method in _FORMATS, method=method).check_method()
    try:
        scheme = _FORMATS[method](settings).scheme()
    except InputError as error:
        raise StoreError(f"{str(folder)!r}: {error}; give quantize= another scheme") from error
    return Schemes(first=scheme, second=scheme)


def _settings(folder: Path) -> Mapping[str, Any] | None:
    """Read the `quantization_config` of a model's configuration, if it has one."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = cast("dict[str, Any]", json.loads(file.read_text()))
        found = config.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{str(file)!r} is not a model's configuration: {error!r}") from error
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None
