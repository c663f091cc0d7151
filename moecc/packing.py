"""Pack a checkpoint with a progress bar: `moecc pack`."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moecc.calibrate import calibrate as measure
from moecc.calibrate import check_calibrates
from moecc.checkpoint.pack import pack
from moecc.checkpoint.packed import is_packed
from moecc.model_forms import find_weights_of
from moecc.runtime.errors import ModelError, OptionError
from moecc.terminal import live_line, stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A store that was written."""

    folder: str
    schemes: tuple[str, ...]
    """In use; empty where experts are as the model has them."""
    blocks: int
    experts: int
    expert_bytes: int
    """Of all experts."""
    record_bytes: int
    """Of one expert of the first block: what a cache reads and holds at a time."""
    calibration: str
    seconds: float


def run(
    model: str,
    output: Path,
    quantize: str,
    dtype: str,
    quiet: bool,
    calibrate: Path | None = None,
    compensate: bool = False,
) -> Packed:
    """Pack `model` into `output`, with a bar on stderr; `calibrate` is a file of text.

    `compensate` is that of `moecc.load`. Raises `OptionError` for an unknown scheme and what
    `moecc.checkpoint.pack.pack` does.
    """
    folder = find_weights_of(model)
    if is_packed(folder):
        raise ModelError(f"{model!r} is packed already; pack the checkpoint that it was made of")
    columns = (TextColumn("packing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    start = perf_counter()
    calibration = None
    if calibrate is not None:
        check_calibrates(quantize or None)
        if not calibrate.is_file():
            raise OptionError(f"there is no file {str(calibrate)!r} to calibrate with")
        text = calibrate.read_text(encoding="utf-8")
        with live_line(f"calibrating on {calibrate}", quiet):
            calibration = measure(folder, [text], dtype, compensate=compensate)
    elif compensate:
        raise OptionError("--compensate needs a text: give --calibrate too")
    with Progress(*columns, TimeRemainingColumn(), console=stderr(quiet), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        name = "" if Path(model).exists() else model
        manifest = pack(folder, output, quantize or None, dtype, show, name, calibration)
    return Packed(
        folder=str(output),
        schemes=tuple(dict.fromkeys(str(one.schemes) for one in manifest.blocks if one.schemes)),
        blocks=len(manifest.blocks),
        experts=sum(block.experts for block in manifest.blocks),
        expert_bytes=sum(block.experts * block.layout.size for block in manifest.blocks),
        record_bytes=manifest.blocks[0].layout.size,
        calibration=manifest.calibration,
        seconds=perf_counter() - start,
    )


def print_packed(done: Packed, console: Console) -> None:
    """Say what was written and what to do with it."""
    size = f"{done.expert_bytes / 1e6:,.1f} MB, {done.record_bytes / 1e6:.3f} MB an expert"
    kind = ", ".join(done.schemes) or "the model's dtype"
    console.print(
        f"{done.experts} experts of {done.blocks} blocks in {kind}: {size} ({done.seconds:.1f} s)",
        highlight=False,
    )
    if done.calibration:
        console.print(done.calibration, highlight=False)
    console.print(f"moecc.load({done.folder!r}, expert_memory=...) reads it", highlight=False)
