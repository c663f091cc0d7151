"""Write a packed store: `moecc pack`.

Experts are read from the checkpoint, converted and written one by one, so that memory holds a few
of them at any time. A shard is written beside its final name and renamed when it is on disk;
killed at any point, the next run goes on behind the last complete shard and gives the same bytes.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from moecc import __version__
from moecc.checkpoint.calibration import Calibration
from moecc.checkpoint.coded import tensors_of
from moecc.checkpoint.files import read_headers
from moecc.checkpoint.fingerprint import fingerprint
from moecc.checkpoint.packed import (
    MANIFEST,
    Manifest,
    PackedBlock,
    Source,
    is_packed,
    read_manifest,
)
from moecc.checkpoint.pieces import Piece, Stored
from moecc.checkpoint.recipes import Recipe, find_recipes, make_record
from moecc.checkpoint.weights import Weights, find_weights
from moecc.checkpoint.without_experts import make_skeleton
from moecc.checkpoint.writing import size_of, write_pieces, write_records, write_text, write_whole
from moecc.passes.options import Options
from moecc.runtime.errors import StoreError
from moecc.settling import settle_budget

Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and all of them."""

_UNFINISHED = "packing.json"
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_COPIED = ("model.safetensors.index.json", MANIFEST, _UNFINISHED)


def pack(
    source: Path,
    folder: Path,
    quantize: str | Mapping[str, str] | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
    name: str = "",
    calibration: Calibration | None = None,
) -> Manifest:
    """Pack the checkpoint in `source` into `folder`; go on where an earlier run was stopped.

    `quantize` is that of `moecc.Options`; None keeps weights as they are. `name` is what the
    manifest calls the source, its path by default. `calibration` says what errors weigh. Raises
    `OptionError` for a bad `quantize`, `StoreError` for damaged or odd checkpoints, for weights
    that are not finite, and when `folder` holds something else.
    """
    options = settle_budget(source, dtype, Options.parse({"quantize": quantize}))
    weights = find_weights(source)
    model, absent = make_skeleton(source, dtype, weights.config)
    recipes = find_recipes(model, absent, weights, options, calibration=calibration)
    manifest = Manifest(
        dtype=str(recipes[0].dtype).removeprefix("torch."),
        source=name or str(source.resolve()),
        calibration="" if calibration is None else str(calibration),
        files=tuple(_source(file) for file in weights.files),
        blocks=tuple(
            PackedBlock(
                path=recipe.path,
                file=f"experts-{number:05}.safetensors",
                layout=recipe.layout,
                experts=recipe.experts,
                schemes=recipe.schemes,
            )
            for number, recipe in enumerate(recipes)
        ),
    )
    if is_packed(folder) and read_manifest(folder) == manifest:
        return manifest
    _begin(folder, manifest)
    rest = _rest(weights, [piece for recipe in recipes for piece in recipe.pieces])
    total = sum(recipe.experts * recipe.layout.size for recipe in recipes)
    total += sum(map(size_of, rest.values()))
    _check_room(folder, total)
    done = 0
    for recipe, block in zip(recipes, manifest.blocks, strict=True):
        target, show = folder / block.file, partial(_show, progress, done, total)
        if not target.is_file():
            write_whole(target, partial(_write_shard, recipe, show))
        done += recipe.experts * recipe.layout.size
    if not (folder / "model.safetensors").is_file():
        write_whole(folder / "model.safetensors", partial(write_pieces, rest))
    if weights.config is not None:
        weights.config.save_pretrained(folder)
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, folder / file.name)
    write_text(folder / MANIFEST, manifest.to_json())
    (folder / _UNFINISHED).unlink(missing_ok=True)
    _show(progress, total, total, 0)
    return manifest


def _show(progress: Progress | None, before: int, total: int, count: int) -> None:
    if progress is not None:
        progress(before + count, total)


def _write_shard(recipe: Recipe, show: Callable[[int], None], part: Path) -> None:
    """Write the records of a checkpoint's block."""
    records = (make_record(recipe, expert) for expert in range(recipe.experts))
    write_records(recipe.path, records, recipe.experts, recipe.layout.size, show, part)


def _rest(weights: Weights, pieces: Sequence[Piece]) -> dict[str, Piece]:
    """List what no expert is made of: tensors of a checkpoint as they are, weights of a GGUF file.

    A GGUF file has its own names for tensors, in types that no other file has.
    """
    taken = {(one.file, one.offset) for piece in pieces for one in tensors_of(piece)}
    every: Mapping[str, Piece] = weights.pieces
    if weights.config is None:
        every = {name: Stored(one) for name, one in read_headers(weights.files).items()}
    return {
        name: piece
        for name, piece in every.items()
        if not any((one.file, one.offset) in taken for one in tensors_of(piece))
    }


def _begin(folder: Path, manifest: Manifest) -> None:
    """Make the folder, or check that it holds the beginning of the same store.

    Raises `StoreError` when it does not.
    """
    unfinished = folder / _UNFINISHED
    settings = json.dumps({"version": __version__, "manifest": manifest.to_json()})
    if unfinished.is_file() and unfinished.read_text() == settings:
        for part in folder.glob("*.part"):
            part.unlink()
        return
    if folder.exists() and any(file.suffix != ".part" for file in folder.iterdir()):
        what = "another store" if unfinished.is_file() or is_packed(folder) else "other files"
        raise StoreError(
            f"{str(folder)!r} holds {what}; choose an empty folder, or delete it to pack again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(unfinished, settings)


def _source(file: Path) -> Source:
    return Source(name=file.name, size=file.stat().st_size, fingerprint=fingerprint(file))


def check_source(manifest: Manifest) -> None:
    """Raise `StoreError` if the checkpoint that was packed is still there and has changed."""
    source = Path(manifest.source)
    for one in manifest.files:
        file = source if source.is_file() else source / one.name
        if file.is_file() and _source(file) != one:
            raise StoreError(
                f"{str(file)!r} has changed since it was packed; pack it again, or move it away to "
                "keep what was packed"
            )


def _check_room(folder: Path, total: int) -> None:
    written = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if free < total - written:
        raise StoreError(
            f"{str(folder)!r} needs {total - written:,} bytes more and the disk has {free:,} free"
        )
