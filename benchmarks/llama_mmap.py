"""Time llama.cpp on a file that is mapped into as much memory as others have for weights.

A fresh process joins a memory cgroup (v1, which takes root) before it opens the file, so that the
group holds what llama.cpp allocates and the pages of the file that it touched. What it allocates is
measured without a limit; the limit is that and the bytes for weights. From then on the system drops
pages and reads them again, as it does wherever a file is larger than memory. It reads ahead as
Linux does by default, whatever the disk is set to: with megabytes, a token reads the whole file.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import llama_cpp

GROUPS = Path("/sys/fs/cgroup/memory")
READAHEAD = "128"
"""KiB."""
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Generations in a group of limited memory; bytes of the group and of one token."""

    rates: tuple[float, ...]
    """Decoded tokens a second, of each round."""
    tokens: tuple[int, ...]
    own: int
    """What is not weights."""
    peak: int
    """Of the whole group under its limit."""
    read: float

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


def run(folder: Path, weights: int, ids: Sequence[int], new_tokens: int, rounds: int) -> Mapped:
    """Write the model in `folder` as GGUF, in its own dtype, and generate with `weights` bytes.

    Raises `RuntimeError` saying why where llama.cpp or such a group cannot be had.
    """
    if not llama_cpp.installed():
        raise RuntimeError("it is not installed: pip install moecc[llama]")
    file = folder / "model.gguf"
    if not file.exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
        kind = _TYPES[model.dtype]
        llama_cpp.write(model, file, kind, kind)
    with file.open("rb") as opened:  # pages belong to the group that reads them first
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    job = {"file": str(file), "weights": weights, "prompt": list(ids), "steps": new_tokens}
    with _group() as group:
        job |= {"group": str(group), "rounds": rounds, "threads": torch.get_num_threads()}
        command = [sys.executable, "-m", "benchmarks.llama_mmap"]
        done = subprocess.run(command, input=json.dumps(job), text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}: {done.stderr[-300:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Mapped(**{name: tuple(v) if isinstance(v, list) else v for name, v in told.items()})


@contextmanager
def _group() -> Generator[Path]:
    group = GROUPS / f"moecc-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise RuntimeError(f"no memory cgroup (v1) can be made here: {error}") from error
    try:
        yield group
    finally:
        group.rmdir()


def main() -> None:
    """Do the job on standard input, in its group."""
    job: dict[str, Any] = json.load(sys.stdin)
    group, prompt, steps = Path(job["group"]), job["prompt"], job["steps"]
    (group / "cgroup.procs").write_text(str(os.getpid()))
    context = len(prompt) + steps + 8
    with _readahead(Path(job["file"])):
        decoder = llama_cpp.Decoder(Path(job["file"]), job["threads"], context)
    decoder.run(prompt, 2)
    own = int(dict(_pairs(group / "memory.stat"))["rss"])
    (group / "memory.limit_in_bytes").write_text(str(own + job["weights"]))
    (group / "memory.max_usage_in_bytes").write_text("0")
    decoder.run(prompt, steps)  # not counted: the pages are those of another time
    before = _read_bytes()
    made = [decoder.run(prompt, steps) for _ in range(job["rounds"])]
    told = {
        "rates": [1 / one.token for one in made],
        "tokens": made[0].tokens,
        "own": own,
        "peak": int((group / "memory.max_usage_in_bytes").read_text()),
        "read": (_read_bytes() - before) / (steps * len(made)),
    }
    print(json.dumps(told))


@contextmanager
def _readahead(file: Path) -> Generator[None]:
    """Let files that are opened inside, on the same disk, be read ahead as by default."""
    device = file.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    before = setting.read_text()
    setting.write_text(READAHEAD)
    try:
        yield
    finally:
        setting.write_text(before)


def _pairs(file: Path) -> list[list[str]]:
    return [line.replace(":", "").split() for line in file.read_text().splitlines()]


def _read_bytes() -> int:
    """Give what this process has had read from disk."""
    return int(dict(_pairs(Path("/proc/self/io")))["read_bytes"])


if __name__ == "__main__":
    main()
