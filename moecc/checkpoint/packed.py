"""The format of a packed store: a model whose experts are ready to be read past the page cache.

    DIR/moecc.json             the manifest: version, source, blocks and their schemes; written last
    DIR/experts-00000.safetensors   one block each: uint8 [E, record], at whole pages
    DIR/model.safetensors      every other tensor of the checkpoint, under its own name
    DIR/*.json, tokenizer      copied

A shard's header holds the crc32 of each expert's record. Any safetensors reader can open it.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from moecc.checkpoint.files import DTYPES, header, read_headers
from moecc.runtime.errors import StoreError
from moecc.runtime.offload.record import PAGE, Layout, Part, up_to
from moecc.runtime.offload.store import Read, Store
from moecc.runtime.schemes.scheme import SCHEMES, Schemes

MANIFEST = "moecc.json"
FORMAT = 2
"""Of the manifest, the shards and the packing of codes; a reader takes no other."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file that was packed."""

    name: str
    size: int
    fingerprint: str
    """sha256 of samples of it (`moecc.checkpoint.fingerprint`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBlock:
    """The experts of one block."""

    path: str
    """Of the module."""
    file: str
    layout: Layout
    experts: int
    schemes: Schemes | None
    """None: experts as the model has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a packed store says about itself."""

    dtype: str
    """Of the model's other weights, and of experts without schemes."""
    source: str
    """The folder or hub id that was packed."""
    files: tuple[Source, ...]
    blocks: tuple[PackedBlock, ...]
    calibration: str = ""
    """On what, and which experts it did not see; empty without."""

    def to_json(self) -> str:
        """Write it, the same text for the same content."""
        blocks = [
            {
                "path": block.path,
                "file": block.file,
                "experts": block.experts,
                "schemes": _scheme_names(block.schemes),
                "parts": [_part_to_dict(part) for part in block.layout.parts],
            }
            for block in self.blocks
        ]
        plain = {
            "format": FORMAT,
            "dtype": self.dtype,
            "source": self.source,
            "calibration": self.calibration,
            "files": [asdict(one) for one in self.files],
            "blocks": blocks,
        }
        return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def is_packed(folder: Path) -> bool:
    """Tell whether a folder is a packed store, complete or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a store's manifest.

    Raises `StoreError` when it is of another version or damaged, saying what to do.
    """
    path = folder / MANIFEST
    try:
        plain = cast("dict[str, Any]", json.loads(path.read_text()))
        if plain["format"] != FORMAT:
            raise StoreError(
                f"{str(folder)!r} was packed in format {plain['format']} and this version reads "
                f"{FORMAT}; run moecc pack again"
            )
        blocks = tuple(
            PackedBlock(
                path=str(one["path"]),
                file=str(one["file"]),
                experts=int(one["experts"]),
                schemes=_schemes(one["schemes"]),
                layout=_layout(one["parts"]),
            )
            for one in plain["blocks"]
        )
        if not isinstance(getattr(torch, str(plain["dtype"]), None), torch.dtype):
            raise ValueError(f"there is no dtype {plain['dtype']!r}")
        return Manifest(
            dtype=str(plain["dtype"]),
            source=str(plain["source"]),
            calibration=str(plain.get("calibration", "")),
            files=tuple(Source(**one) for one in plain["files"]),
            blocks=blocks,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{str(path)!r} is damaged ({error!r}); run moecc pack again") from error


def open_store(folder: Path, block: PackedBlock) -> Store:
    """Find a block's records, and hold the manifest against the shard.

    Raises `StoreError` naming the file when it is missing, cut off, or not what is claimed.
    """
    file = folder / block.file
    if not file.is_file():
        raise StoreError(f"packed store {str(folder)!r} lacks {block.file!r}; run moecc pack again")
    tensors = read_headers([file])
    expected = (block.experts, block.layout.size)
    tensor = tensors.get(block.path)
    if tensor is None or tensor.shape != expected or tensor.dtype != torch.uint8:
        found = {name: [*one.shape] for name, one in tensors.items()}
        raise StoreError(
            f"the manifest of {str(folder)!r} says that {block.file!r} holds {block.path!r} as "
            f"uint8 {[*expected]}, and it holds {found}; run moecc pack again"
        )
    listed = str(header(file)[0].get("__metadata__", {}).get("crc32", "")).split()
    if len(listed) != block.experts or tensor.offset % PAGE:
        raise StoreError(f"{str(file)!r} was not written by moecc pack; run it again")
    length = block.layout.size
    reads = tuple(
        (Read(file=file, offset=tensor.offset + number * length, length=length, into=0),)
        for number in range(block.experts)
    )
    checksums = tuple(int(one, 16) for one in listed)
    return Store(name=block.path, layout=block.layout, reads=reads, checksums=checksums)


def shard_header(name: str, experts: int, length: int, checksums: list[int]) -> bytes:
    """Write the header of a shard: whole pages, the same size whatever the checksums are."""
    entry = {"dtype": "U8", "shape": [experts, length], "data_offsets": [0, experts * length]}
    metadata = {"format": "pt", "crc32": " ".join(f"{one:08x}" for one in checksums)}
    return padded_header({"__metadata__": metadata, name: entry}, PAGE)


def padded_header(entries: Mapping[str, Any], unit: int) -> bytes:
    """Write a safetensors header so that data begins at a multiple of `unit`."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = up_to(8 + len(text), unit) - 8
    return struct.pack("<Q", length) + text.ljust(length)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as safetensors does."""
    return _NAMES[dtype]


def _part_to_dict(part: Part) -> dict[str, Any]:
    return {"name": part.name, "shape": [*part.shape], "dtype": dtype_name(part.dtype)}


def _scheme_names(schemes: Schemes | None) -> list[str] | None:
    return None if schemes is None else [str(schemes.first), str(schemes.second)]


def _schemes(names: list[str] | None) -> Schemes | None:
    if names is None:
        return None
    first, second = names
    return Schemes(first=SCHEMES[first], second=SCHEMES[second])


def _layout(parts: Any) -> Layout:
    """Lay out the parts as they were; offsets follow from them."""
    matrices = {
        str(one["name"]): (tuple(map(int, one["shape"])), DTYPES[one["dtype"]]) for one in parts
    }
    return Layout.of(matrices)
