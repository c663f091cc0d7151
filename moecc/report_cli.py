"""The command `moecc report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moecc.arguments import AllLayers, AsJson, Dtype, Full, Kernels, Model, Quantize, Weights
from moecc.plain import plain
from moecc.runtime.errors import OptionError
from moecc.terminal import live_line, stderr

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    epilog="Examples: [b]moecc report qwen3_moe -o report.html[/b] · "
    "[b]moecc report CHECKPOINT -o report.html --memory 25% --trace t.jsonl[/b] · "
    "[b]moecc report model.py:make --json[/b]"
)
def report(
    model: Model,
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
    quantize: Quantize = "",
    kernels: Kernels = "auto",
    full: Full = False,
    all_layers: AllLayers = False,
    weights: Weights = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write what moecc does to MODEL as one HTML file that needs no network.

    Graphs before and after each pass, a roofline, with --memory a plan (of a model type at its
    default size), and with --trace the load of experts and what their cache did. Exit status 1 if
    no MoE block was found or something fell back.
    """
    from moecc import inspection
    from moecc.report_html import report as reports
    from moecc.runtime.offload import profile as profiles

    machines = [profiles.read(name) for name in profile.split(",")]
    if len(machines) > reports.MOST_MACHINES:
        raise OptionError(f"--profile names {len(machines)}; up to four are told apart")
    if output is None and not as_json:
        raise typer.BadParameter("give a file to write with -o FILE, or --json")
    with live_line(f"compiling {model}"):
        seen = inspection.inspect(model, kernels, dtype, full, all_layers, weights)
        data = reports.gather(
            seen, machines, memory=memory, trace=trace, quantize=quantize, dtype=dtype
        )
    if output is not None:
        text = reports.html(data)
        output.write_text(text, encoding="utf-8")
        stderr().print(f"{output}: {len(text) / 1e6:.1f} MB", markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps(plain(reports.told(data)), indent=2))
    if inspection.has_problem(seen):
        raise typer.Exit(1)
