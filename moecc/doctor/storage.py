"""Look at the folder of caches, and measure the disk that it is on as the engine reads it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from moecc.codegen.native.build import cache_folder, kept_folder
from moecc.doctor.check import Check, broken, limited, ok
from moecc.measuring import store_bandwidth
from moecc.runtime.errors import MoeccError
from moecc.runtime.offload.link import READERS
from moecc.runtime.offload.record import Layout
from moecc.runtime.offload.store import Read, Store, opens_directly

_EXPERTS, _SIZE = 16, 4 << 20
_LITTLE = 2 << 30


def storage() -> Iterator[Check]:
    """Check rights and space of the cache folder, and read experts that were written there."""
    try:
        folder = kept_folder()
    except (OSError, RuntimeError) as error:
        fix = "make the folder yours alone (chown, chmod 700), or set XDG_CACHE_HOME to one that is"
        yield limited("cache folder", f"{error}; kernels are built anew in each process", fix)
        folder = cache_folder()
    else:
        yield ok("cache folder", f"{folder}, open to you alone")
    free = shutil.disk_usage(folder).free
    if free < _LITTLE:
        fix = "free some space, or set XDG_CACHE_HOME: packed experts are written there"
        yield limited("disk space", f"{free / 1e9:.1f} GB free", fix)
        return
    yield ok("disk space", f"{free / 1e9:,.0f} GB free")
    try:
        yield from _disk(folder)
    except (OSError, MoeccError) as error:
        yield broken("disk", f"{folder} cannot be read back: {error}", "look at the disk, dmesg")


def _disk(folder: Path) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="doctor-") as name:
        file = Path(name) / "experts"
        with file.open("wb") as out:
            for _ in range(_EXPERTS):  # random: some disks compress
                out.write(torch.randint(256, (_SIZE,), dtype=torch.uint8).numpy().tobytes())
            out.flush()
            os.fsync(out.fileno())
        reads = tuple(
            (Read(file=file, offset=number * _SIZE, length=_SIZE, into=0),)
            for number in range(_EXPERTS)
        )
        layout = Layout.of({"gate_up": ((_SIZE,), torch.uint8)})
        store = Store(name="doctor", layout=layout, reads=reads)
        one, several = store_bandwidth(store), store_bandwidth(store, READERS)
        found = f"{one / 1e9:.2f} GB/s by one reader, {several / 1e9:.2f} GB/s by {READERS}"
        if opens_directly(file):
            yield ok("disk", f"{found}, past the page cache", measured=several)
        else:
            fix = "keep checkpoints on a disk with direct I/O (ext4, xfs), not tmpfs or a network"
            yield limited("disk", f"{found}, and only through the page cache", fix)
