"""Commands that read no weights of a checkpoint: passes, why and kernels."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moecc.arguments import (
    AllLayers,
    AsJson,
    Dtype,
    Full,
    Kernels,
    Model,
    Quantize,
    Weights,
    complete_pass,
    complete_target,
)
from moecc.terminal import live_line, show

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    epilog="Examples: [b]moecc passes qwen3_moe[/b] · "
    "[b]moecc passes mixtral --diff fuse_experts[/b] · [b]moecc passes mixtral --time[/b] · "
    "[b]moecc passes model.py:make --dump graphs[/b]"
)
def passes(
    model: Model,
    diff: Annotated[
        str,
        typer.Option(
            help="Show what this pass changed.", show_default=False, autocompletion=complete_pass
        ),
    ] = "",
    dump: Annotated[
        Path | None, typer.Option(help="Write graphs and kernels here.", show_default=False)
    ] = None,
    time: Annotated[
        bool,
        typer.Option("--time", help="Compile with inductor too; show where time and memory went."),
    ] = False,
    kernels: Kernels = "auto",
    full: Full = False,
    all_layers: AllLayers = False,
    weights: Weights = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Compile MODEL for a prefill of 2 x 16 tokens and show what each pass did.

    Exit status 1 if no MoE block was found or something fell back.
    """
    from moecc import inspection

    if diff:
        inspection.check_pass(diff)
    inner = "inductor" if time else "eager"
    with live_line(f"compiling {model}"):
        seen = inspection.inspect(model, kernels, dtype, full, all_layers, weights, inner)
    if diff:
        show(inspection.diff_of(seen, diff), as_json, inspection.print_diff)
    else:
        show(inspection.told(seen), as_json, partial(inspection.print_inspection, timed=time))
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
    full: Full = False,
    all_layers: AllLayers = False,
    weights: Weights = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say for each MoE block, and for what looks like one, why it was matched or not.

    Exit status 1 if something was not matched, or nothing was found.
    """
    from moecc import inspection, reasons

    with live_line(f"compiling {model}"):
        seen = inspection.inspect(model, "auto", dtype, full, all_layers, weights)
        answers = reasons.answers(seen, path)
    show(answers, as_json, reasons.print_answers)
    if not answers or not all(answer.matched for answer in answers):
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [b]moecc kernels qwen3_moe --target sm_90 --tokens 1,64,4096[/b] · "
    "[b]moecc kernels CHECKPOINT --quantize int4 --source[/b]"
)
def kernels(
    model: Model,
    target: Annotated[
        str,
        typer.Option(help="A GPU such as sm_80, sm_90 or gfx942.", autocompletion=complete_target),
    ] = "sm_90",
    tokens: Annotated[str, typer.Option(help="Token counts to plan for.")] = "1,64,4096",
    quantize: Quantize = "",
    source: Annotated[bool, typer.Option("--source", help="Print the kernels as well.")] = False,
    full: Full = False,
    all_layers: AllLayers = False,
    weights: Weights = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which Triton kernels the blocks of MODEL run on a GPU, at what cost, and what they use.

    Needs no GPU. Exit status 1 if a kernel spills registers or does not fit.
    """
    from moecc import kernel_plans

    counts = kernel_plans.parse_tokens(tokens)
    with live_line(f"compiling {model} and its kernels for {target}"):
        found = kernel_plans.explain(
            model, target, counts, quantize, dtype, full, all_layers, weights
        )
    show(found, as_json, partial(kernel_plans.print_plans, source=source))
    if kernel_plans.has_problem(found):
        raise typer.Exit(1)
