"""The command line. Exit status: 0 fine, 1 a problem was found, 2 wrong use."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moecc import __version__, bench_cli, inspect_cli, offload_cli, report_cli
from moecc.arguments import AsJson, Checkpoint, Dtype, Kernels, Prompt, Quantize
from moecc.runtime.errors import MoeccError
from moecc.terminal import live_line, show

app = typer.Typer(
    help="Look inside moecc, a torch.compile backend for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(inspect_cli.app)
app.add_typer(offload_cli.app)
app.add_typer(bench_cli.app)
app.add_typer(report_cli.app)


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
    epilog='Examples: [b]moecc run benchmarks/reference -p "In the beginning"[/b] · '
    "[b]moecc run MODEL --prompt-file prompt.txt -n 200 --rounds 5[/b] · "
    '[b]moecc run MODEL -p "..." --expert-memory 50% --speculate auto[/b]'
)
def run(
    model: Checkpoint,
    prompt: Prompt = "",
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Timed generations each way.", min=1)] = 3,
    expert_memory: Annotated[
        str, typer.Option(help="Leave experts on disk and keep so much of them, as 8GiB or 25%.")
    ] = "",
    quantize: Quantize = "",
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

    With --expert-memory, --quantize or --speculate, and a packed store or GGUF file, load it with
    moecc.load instead, and show what the cache of experts and the drafts did. Exit status 1 if the
    tokens differ by more than a tie within the dtype's rounding.
    """
    from moecc import demo, offload_demo
    from moecc.model_forms import Form, form_of

    if prompt_file is not None:
        if not prompt_file.is_file():
            raise typer.BadParameter(f"there is no file {str(prompt_file)!r}")
        prompt = prompt_file.read_text()
    if not prompt:
        raise typer.BadParameter("give a prompt with -p TEXT or --prompt-file FILE")
    options: dict[str, Any] = {"kernels": kernels}
    lent = form_of(model) in (Form.PACKED, Form.GGUF)  # which transformers alone does not read
    if lent or expert_memory or quantize or speculate:
        from moecc.speculation.speculate import speculate as with_drafts

        options |= {"expert_memory": expert_memory or None, "quantize": quantize or None}
        k = int(speculate) if speculate.isdecimal() else speculate
        drafts = partial(with_drafts, k, draft=draft) if speculate else None
        if drafts:
            drafts()  # raises for bad arguments
        loaded = offload_demo.run(
            model, prompt, new_tokens, rounds, options, dtype, quiet=as_json, speculate=drafts
        )
        show(loaded, as_json, offload_demo.print_demo)
        return
    shown = demo.run(model, prompt, new_tokens, rounds, options, dtype, quiet=as_json)
    show(shown, as_json, demo.print_demo)
    difference = shown.comparison.difference
    if difference is not None and not difference.is_tie:
        raise typer.Exit(1)


@app.command(epilog="Examples: [b]moecc doctor[/b] · [b]moecc doctor --json[/b]")
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: what works, how fast it is, what does not work and how to mend it.

    Takes some seconds. Exit status 1 if something is broken.
    """
    from moecc.doctor.examine import examine, print_examined

    with live_line("looking at this machine") as tell:
        seen = examine(tell)
    show(seen, as_json, print_examined)
    if seen.broken:
        raise typer.Exit(1)


def main() -> Any:
    """Run the command line; moecc's own errors are a line on stderr and status 2."""
    try:
        return app()
    except MoeccError as error:
        Console(stderr=True, highlight=False).print(f"moecc: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
