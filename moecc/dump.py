"""Write graphs and kernels to the folder named by MOECC_DUMP."""

import itertools
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from moecc.passes.ir import Lowering
from moecc.passes.pipeline import Step

_graphs = itertools.count()
_keeping = False


def wants_text() -> bool:
    """Tell whether passes should keep the graph's text before and after each of them."""
    return _keeping or bool(os.environ.get("MOECC_DUMP"))


@contextmanager
def keeping_text() -> Generator[None]:
    """Keep texts of the graphs compiled inside."""
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before


def write(steps: tuple[Step, ...], lowerings: tuple[Lowering, ...]) -> None:
    """Write the next graph to `$MOECC_DUMP/graph0`, `graph1`, ..., if the variable is set."""
    folder = os.environ.get("MOECC_DUMP")
    if folder:
        write_to(Path(folder) / f"graph{next(_graphs)}", steps, lowerings)


def write_to(
    folder: Path, steps: tuple[Step, ...], lowerings: tuple[Lowering, ...]
) -> tuple[Path, ...]:
    """Write `01_detect_moe.before.txt` and so on, and each kernel's source; return the files."""
    texts = {
        f"{number:02}_{step.name}.{when}.txt": text
        for number, step in enumerate(steps, 1)
        for when, text in (("before", step.before), ("after", step.after))
    }
    sources = dict.fromkeys((lowering.kernel, lowering.source) for lowering in lowerings)
    texts |= {f"kernel{i}.txt": f"{key}\n\n{code}\n" for i, (key, code) in enumerate(sources)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return tuple(folder / name for name in texts)
