"""Say what a record was measured on: the machine, what it gives right now, versions, date, commit.

    python -m benchmarks.harness.machine            # as JSON

Runs in a process of its own before each scenario, so that the memory that it reads is free again.
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNKNOWN = "unknown"
PACKAGES = (
    "moecc", "torch", "triton", "transformers", "accelerate", "xllamacpp", "libggml-python",
    "onnxruntime", "kt-kernel", "vllm", "moe-infinity", "hqq", "torchao", "gguf",
)  # fmt: skip
_DISK = 1 << 28
"""Bytes that are read to time the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine at one time; None is what was not measured."""

    cpu: str
    """The processor, threads, instruction set and torch, as `moecc.measuring.machine` says."""
    cores: int
    load: float
    """Processes that wanted a core, on average, in the minute before."""
    read_bandwidth: float | None = None
    """Bytes a second of memory, with all threads."""
    product_rate: float | None = None
    """Floating-point operations a second of float32 `torch.mm`."""
    disk_bandwidth: float | None = None
    """Bytes a second of a file in the working directory, past the page cache."""
    versions: dict[str, str]

    def __str__(self) -> str:
        """Give one line."""
        said = [self.cpu, f"{self.cores} cores"]
        if self.read_bandwidth and self.product_rate:
            said.append(f"reads {self.read_bandwidth / 1e9:.1f} GB/s")
            said.append(f"float32 products {self.product_rate / 1e9:.0f} GFLOP/s")
        if self.disk_bandwidth:
            said.append(f"disk {self.disk_bandwidth / 1e9:.2f} GB/s")
        return ", ".join([*said, f"load {self.load:.1f}"])


def measure(rates: bool) -> Machine:
    """Describe this machine; with `rates`, time memory, products and the disk, in about 3 s."""
    from moecc import measuring

    load = os.getloadavg()[0]  # before anything of ours adds to it
    return Machine(
        cpu=measuring.machine(),
        cores=len(os.sched_getaffinity(0)),
        load=load,
        read_bandwidth=measuring.read_bandwidth() if rates else None,
        product_rate=measuring.product_rate() if rates else None,
        disk_bandwidth=disk_bandwidth(Path.cwd()) if rates else None,
        versions=versions(),
    )


def measure_apart(rates: bool) -> Machine:
    """Do that in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, *([] if rates else ["--no-rates"])]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Machine(**json.loads(done.stdout))


def versions() -> dict[str, str]:
    """Give those of Python and of the packages that take part, where they are installed."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def disk_bandwidth(folder: Path) -> float | None:
    """Read a new file past the page cache; None where the file system cannot do that."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(1 << 20) * (_DISK >> 20))
        file.flush()
        os.fsync(file.fileno())
        try:
            direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except (AttributeError, OSError):  # no such flag on this system, or not for these files
            return None
        buffer = mmap.mmap(-1, 1 << 23)  # aligned to a page, as direct reads have to be
        start = time.perf_counter()
        while os.readv(direct, [buffer]):
            pass
        seconds = time.perf_counter() - start
        os.close(direct)
    return _DISK / seconds


def commit() -> str:
    """Name the commit that is checked out, and whether files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " and changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or an archive without history
        return UNKNOWN


def now() -> str:
    """Give the date and time, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    print(json.dumps(asdict(measure("--no-rates" not in sys.argv))))
