"""Hold the arguments that commands share, and what a shell completes for them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moecc.tiny_families import FAMILIES


def complete_model(incomplete: str) -> list[str]:
    """Give the model types, folders and files that begin so."""
    types = [name for name in FAMILIES if name.startswith(incomplete)]
    start = incomplete.rpartition("/")[2]
    folder = incomplete.removesuffix(start)
    endings = {".py": ":", ".gguf": ""}
    paths = [
        f"{folder}{path.name}{'/' if path.is_dir() else endings[path.suffix]}"
        for path in sorted(Path(folder or ".").glob(f"{start}*"))
        if path.is_dir() or path.suffix in endings
    ]
    return [*types, *paths]


def complete_pass(incomplete: str) -> list[str]:
    """Give the passes that begin so."""
    from moecc.passes.pipeline import PIPELINE

    return [one.__name__ for one in PIPELINE if one.__name__.startswith(incomplete)]


def complete_scheme(incomplete: str) -> list[str]:
    """Give the schemes that begin so."""
    from moecc.runtime.schemes.scheme import SCHEMES

    return [name for name in SCHEMES if name.startswith(incomplete)]


def complete_target(incomplete: str) -> list[str]:
    """Give the GPUs that begin so."""
    from moecc.codegen.gpus import GPUS

    return [name for name in GPUS if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a packed store, a GGUF file, a hub id, a transformers model "
        "type such as qwen3_moe (a tiny random instance), or file.py:factory.",
        metavar="MODEL",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Planned = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a packed store, a GGUF file, a hub id, file.py:factory, or a "
        "transformers model type at its default size, for most the one that was published.",
        metavar="MODEL",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a packed store, a GGUF file or a hub id.",
        metavar="MODEL",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        help="Of a model type, its default configuration, without weights, not a tiny one.",
    ),
]
AllLayers = Annotated[
    bool,
    typer.Option("--all-layers", help="Without weights: trace all layers, not some of each kind."),
]
Weights = Annotated[
    bool,
    typer.Option("--weights", help="Load a checkpoint's weights, which Python loops need."),
]
Kernels = Annotated[
    Literal["auto", "triton", "native", "torch"], typer.Option(help="Who writes the kernels.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"], typer.Option(help="Of weights.")
]
Quantize = Annotated[
    str,
    typer.Option(
        help="Scheme of the experts, such as int4; empty keeps them as they are.",
        autocompletion=complete_scheme,
    ),
]
Prompt = Annotated[
    str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)
]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text (docs/cli.md).")]
