"""The command line. Exit status: 0 fine, 1 a problem was found, 2 wrong use."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moecc import __version__, offload_cli
from moecc.runtime.errors import MoeccError

app = typer.Typer(
    help="Look inside moecc, a torch.compile backend for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(offload_cli.app)

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a hub id, a transformers model type such as qwen3_moe "
        "(a tiny random instance), or file.py:factory.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Kernels = Annotated[str, typer.Option(help="Emitter: auto, triton, native or torch.")]
Dtype = Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16 or float16.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command(
    epilog="Examples: [b]moecc passes qwen3_moe[/b] · "
    "[b]moecc passes mixtral --diff fuse_experts[/b] · "
    "[b]moecc passes model.py:make --dump graphs[/b]"
)
def passes(
    model: Model,
    diff: Annotated[
        str, typer.Option(help="Show what this pass changed.", show_default=False)
    ] = "",
    dump: Annotated[
        Path | None, typer.Option(help="Write graphs and kernels here.", show_default=False)
    ] = None,
    kernels: Kernels = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Compile MODEL for a prefill of 2 x 16 tokens and show what each pass did.

    Exit status 1 if no MoE block was found or something fell back.
    """
    from moecc import inspection

    seen = inspection.inspect(model, kernels, dtype)
    if diff:
        typer.echo(inspection.diff_text(seen, diff))
    elif as_json:
        typer.echo(json.dumps(inspection.to_dict(seen), indent=2))
    else:
        inspection.print_inspection(seen, Console())
    if dump:
        for file in inspection.dump(seen, dump):
            typer.echo(file, err=True)
    if inspection.has_problem(seen):
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [b]moecc why qwen3_moe[/b] · "
    "[b]moecc why model.py:make layers.3.mlp[/b] · [b]moecc why CHECKPOINT --json[/b]"
)
def why(
    model: Model,
    path: Annotated[
        str, typer.Argument(help="Only this module and what is in it.", show_default=False)
    ] = "",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say for each MoE block, and for what looks like one, why it was matched or not.

    Exit status 1 if something was not matched, or nothing was found.
    """
    from moecc import inspection, reasons

    answers = reasons.answers(inspection.inspect(model, dtype=dtype), path)
    if as_json:
        typer.echo(json.dumps([answer.to_dict() for answer in answers], indent=2))
    else:
        reasons.print_answers(answers, Console())
    if not answers or not all(answer.matched for answer in answers):
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [b]moecc kernels qwen3_moe --target sm_90 --tokens 1,64,4096[/b] · "
    "[b]moecc kernels CHECKPOINT --quantize int4 --source[/b]"
)
def kernels(
    model: Model,
    target: Annotated[str, typer.Option(help="A GPU such as sm_80, sm_90 or gfx942.")] = "sm_90",
    tokens: Annotated[str, typer.Option(help="Token counts to plan for.")] = "1,64,4096",
    quantize: Annotated[str, typer.Option(help="Scheme of the experts, such as int4.")] = "",
    source: Annotated[bool, typer.Option("--source", help="Print the kernels as well.")] = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which Triton kernels the blocks of MODEL run on a GPU, at what cost, and what they use.

    Needs no GPU. Exit status 1 if a kernel spills registers or does not fit.
    """
    from moecc import kernel_plans

    counts = kernel_plans.parse_tokens(tokens)
    found = kernel_plans.explain(model, target, counts, quantize, dtype)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=2))
    else:
        kernel_plans.print_plans(found, Console(), source)
    if kernel_plans.has_problem(found):
        raise typer.Exit(1)


@app.command(
    epilog='Examples: [b]moecc run benchmarks/reference -p "In the beginning"[/b] · '
    "[b]moecc run MODEL --prompt-file prompt.txt -n 200 --rounds 5[/b] · "
    '[b]moecc run MODEL -p "..." --expert-memory 50% --speculate auto[/b]'
)
def run(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue.")] = "",
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Timed generations each way.", min=1)] = 3,
    expert_memory: Annotated[
        str, typer.Option(help="Leave experts on disk and keep so much of them, as 8GiB or 25%.")
    ] = "",
    quantize: Annotated[str, typer.Option(help="Scheme of the experts, such as int4.")] = "",
    speculate: Annotated[
        str, typer.Option(help="Draft so many tokens a pass, or auto: as many as pay.")
    ] = "",
    draft: Annotated[
        str,
        typer.Option(help="What drafts: cached, a scheme of the model's own experts, or prompt."),
    ] = "auto",
    kernels: Kernels = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate text with MODEL through moecc, beside transformers eager, and compare the tokens.

    With --expert-memory, --quantize or --speculate, load it with moecc.load instead, and show what
    the cache of experts and the drafts did. Exit status 1 if the tokens differ by more than a tie
    within the dtype's rounding.
    """
    from moecc import demo, offload_demo

    if prompt_file is not None:
        if not prompt_file.is_file():
            raise typer.BadParameter(f"there is no file {str(prompt_file)!r}")
        prompt = prompt_file.read_text()
    if not prompt:
        raise typer.BadParameter("give a prompt with -p TEXT or --prompt-file FILE")
    options: dict[str, Any] = {"kernels": kernels}
    if expert_memory or quantize or speculate:
        from moecc.speculation.speculate import speculate as with_drafts

        options |= {"expert_memory": expert_memory or None, "quantize": quantize or None}
        k = int(speculate) if speculate.isdecimal() else speculate
        drafts = partial(with_drafts, k, draft=draft) if speculate else None
        if drafts:
            drafts()  # raises for bad arguments
        loaded = offload_demo.run(
            model, prompt, new_tokens, rounds, options, dtype, quiet=as_json, speculate=drafts
        )
        if as_json:
            typer.echo(json.dumps(loaded.to_dict(), indent=2))
        else:
            offload_demo.print_demo(loaded, Console())
        return
    shown = demo.run(model, prompt, new_tokens, rounds, options, dtype, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(shown.to_dict(), indent=2))
    else:
        demo.print_demo(shown, Console())
    difference = shown.comparison.difference
    if difference is not None and not difference.is_tie:
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [b]moecc pack CHECKPOINT --quantize int4 -o packed[/b] · "
    "[b]moecc pack org/name -o packed --json[/b]"
)
def pack(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint folder in safetensors, or a hub id.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write.", show_default=False)
    ],
    quantize: Annotated[
        str, typer.Option(help="Scheme of the experts; empty keeps them as they are.")
    ] = "",
    dtype: Dtype = "auto",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A text that the model is run on first; errors then weigh as inputs are large.",
            show_default=False,
        ),
    ] = None,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate", help="With --calibrate: codes make up for each other's errors (slow)."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL with its experts packed one by one, ready to be read from disk.

    Stopped at any point, the same command goes on where it was. `moecc.load` reads the folder.
    """
    from moecc import packing

    done = packing.run(
        model, output, quantize, dtype, as_json, calibrate=calibrate, compensate=compensate
    )
    if as_json:
        typer.echo(json.dumps(done.to_dict(), indent=2))
    else:
        packing.print_packed(done, Console())


def main() -> Any:
    """Run the command line; moecc's own errors are a line on stderr and status 2."""
    try:
        return app()
    except MoeccError as error:
        Console(stderr=True, highlight=False).print(f"moecc: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
