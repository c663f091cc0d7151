"""Write graphs and kernels to the folder named by MOECC_DUMP; log topics named by MOECC_LOG."""

import itertools
import logging
import os
from pathlib import Path

from moecc.passes.pipeline import Result

log = logging.getLogger("moecc")
_graphs = itertools.count()


def wanted() -> bool:
    """Tell whether MOECC_DUMP names a folder."""
    return bool(os.environ.get("MOECC_DUMP"))


def write(result: Result) -> None:
    """Write `graph0/01_detect_moe.before.txt` and so on, and each kernel's source."""
    if not wanted():
        return
    write_to(Path(os.environ["MOECC_DUMP"]) / f"graph{next(_graphs)}", result)


def write_to(folder: Path, result: Result) -> list[Path]:
    """Write one graph's passes and kernels into a folder; return the files."""
    texts = {
        f"{number:02}_{step.name}.{when}.txt": text
        for number, step in enumerate(result.steps, 1)
        for when, text in (("before", step.before), ("after", step.after))
    }
    sources = dict.fromkeys((low.kernel, low.source) for low in result.program.lowerings)
    texts |= {f"kernel{i}.txt": f"{key}\n\n{code}\n" for i, (key, code) in enumerate(sources)}
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text)
    return files
