"""The command `moecc report`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    epilog="Examples: [b]moecc report qwen3_moe -o report.html[/b] · "
    "[b]moecc report CHECKPOINT -o report.html --memory 25% --trace t.jsonl[/b] · "
    "[b]moecc report model.py:make --json[/b]"
)
def report(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a hub id, a transformers model type or file.py:factory.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ] = None,
    trace: Annotated[
        str, typer.Option(help="A file of moecc trace: expert load, and what the cache did.")
    ] = "",
    memory: Annotated[str, typer.Option(help="Plan for so much, as 8GiB or 25%.")] = "",
    profile: Annotated[
        str, typer.Option(help="Hardware: files of moecc profile, or names; up to four.")
    ] = "a100-pcie4,h100-pcie5,rtx4090",
    quantize: Annotated[str, typer.Option(help="Of the plan: scheme of the experts.")] = "",
    kernels: Annotated[str, typer.Option(help="Emitter: auto, triton, native or torch.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what the pictures show as JSON.")
    ] = False,
) -> None:
    """Write what moecc does to MODEL as one HTML file that needs no network.

    Graphs before and after each pass, a roofline, with --memory a plan, and with --trace the load
    of experts and what their cache did. Exit status 1 if no MoE block was found or something fell
    back.
    """
    from moecc import inspection
    from moecc.report_html import report as reports
    from moecc.runtime.offload import profile as profiles

    machines = [profiles.read(name) for name in profile.split(",")]
    if len(machines) > reports.MOST_MACHINES:
        raise typer.BadParameter(f"--profile names {len(machines)}; up to four are told apart")
    if output is None and not as_json:
        raise typer.BadParameter("give a file to write with -o FILE, or --json")
    seen = inspection.inspect(model, kernels, dtype)
    data = reports.gather(
        seen, machines, memory=memory, trace=trace, quantize=quantize, dtype=dtype
    )
    if as_json:
        typer.echo(json.dumps(asdict(reports.told(data)), indent=2))
    if output is not None:
        text = reports.html(data)
        output.write_text(text, encoding="utf-8")
        size = f"{len(text) / 1e6:.1f} MB"
        Console(stderr=True).print(f"{output}: {size}", markup=False, highlight=False)
    if inspection.has_problem(seen):
        raise typer.Exit(1)
