"""Commands about experts on disk: trace, replay, profile, plan and pack."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moecc.arguments import AsJson, Checkpoint, Dtype, Output, Planned, Prompt, Quantize
from moecc.terminal import live_line, show

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    epilog='Examples: [b]moecc trace benchmarks/reference -p "In the beginning" -o t.jsonl[/b] · '
    '[b]moecc trace MODEL -p "..." -o t.jsonl --expert-memory 25% --policy lookahead[/b]'
)
def trace(
    model: Checkpoint,
    prompt: Prompt,
    output: Output,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=2)] = 64,
    expert_memory: Annotated[
        str, typer.Option(help="How much of the experts is in memory, as 8GiB or 25%.")
    ] = "100%",
    policy: Annotated[str, typer.Option(help="Eviction: auto, lru, lfu or lookahead.")] = "auto",
    lookahead: Annotated[
        int | None, typer.Option(help="Layers ahead that are predicted; 0 is none.", min=0)
    ] = None,
    quantize: Quantize = "",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate text with MODEL, and record which experts each block asked for.

    The cache is empty at the beginning of what is recorded. `moecc replay` reads the file.
    """
    from moecc import tracing

    options: dict[str, Any] = {"expert_memory": expert_memory, "policy": policy}
    options |= {"lookahead": "auto" if lookahead is None else lookahead}
    options |= {"quantize": quantize or None}
    made = tracing.run(model, prompt, new_tokens, output, options, dtype, quiet=as_json)
    show(made, as_json, tracing.print_traced)


@app.command(
    epilog="Examples: [b]moecc replay t.jsonl[/b] · "
    "[b]moecc replay t.jsonl --policy lru,belady --memory 25%,50% --predict none,perfect[/b] · "
    "[b]moecc replay t.jsonl --memory 25% --predict governed --profile a100-pcie4[/b]"
)
def replay(
    trace: Annotated[
        Path, typer.Argument(help="A file of moecc trace.", show_default=False, metavar="TRACE")
    ],
    policy: Annotated[
        str, typer.Option(help="lru, lfu, lookahead, and belady, which knows the future.")
    ] = "lru,lfu,lookahead,belady",
    memory: Annotated[str, typer.Option(help="Budgets as 8GiB or 25%; own is the run's.")] = "own",
    predict: Annotated[
        str,
        typer.Option(
            help="none; recorded (what the run let in); top-k (the first K of all predictions of "
            "the run); perfect (a bound); with a profile governed, as the engine decides."
        ),
    ] = "none,recorded,perfect",
    pool: Annotated[
        str,
        typer.Option(help="own (the run's); shared: blocks take each other's slots."),
    ] = "own",
    by_benefit: Annotated[
        bool, typer.Option(help="Share budgets as the trace says that they help most.")
    ] = False,
    profile: Annotated[
        str, typer.Option(help="Simulate times on hardware: a file of moecc profile, or a name.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Tell what other caches would have done in a recorded run, and how fast it would have been.

    Exit status 1 if the run's own settings, replayed, do not give the counts of its engine.
    """
    from moecc import replaying
    from moecc.runtime.offload import profile as profiles
    from moecc.runtime.offload import recording

    with live_line(f"replaying {trace}", as_json):
        shown = replaying.run(
            recording.read(trace),
            policy.split(","),
            memory.split(","),
            predict.split(","),
            profiles.read(profile) if profile else None,
            by_benefit,
            pool.split(","),
        )
    show(shown, as_json, replaying.print_replayed)
    if not shown.agrees:
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [b]moecc profile benchmarks/reference -o here.toml[/b] · "
    "[b]moecc replay t.jsonl --memory 25% --profile here.toml[/b]"
)
def profile(
    model: Checkpoint,
    output: Output,
    prompt: Prompt = "In the beginning God created the heaven and the earth.",
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=8)] = 32,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure this machine with MODEL: its disk, its kernels and what a token takes beside them.

    All experts have to fit in memory for that. The machine should have nothing else to do.
    """
    from moecc import profiling

    made = profiling.run(model, prompt, new_tokens, output, dtype, quiet=as_json)
    show(made, as_json, lambda _, console: console.out(output.read_text(), highlight=False, end=""))


@app.command(
    epilog="Examples: [b]moecc plan CHECKPOINT --memory 8GiB[/b] · "
    "[b]moecc plan deepseek_v3 --memory 10% --quantize int4[/b] · "
    "[b]moecc plan CHECKPOINT --memory 25% --trace t.jsonl --profile here.toml[/b]"
)
def plan(
    model: Planned,
    memory: Annotated[str, typer.Option(help="For experts, as 8GiB or 25%.", show_default=False)],
    quantize: Quantize = "",
    trace: Annotated[
        str, typer.Option(help="A file of moecc trace: slots go where they are hit most.")
    ] = "",
    profile: Annotated[
        str, typer.Option(help="Hardware: files of moecc profile, or names.")
    ] = "a100-pcie4,h100-pcie5,rtx4090",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Tell how many experts of each block fit, and how fast MODEL would decode.

    No weight is read: the model is made on the meta device.
    """
    from moecc import planning
    from moecc.passes.options import parse_memory
    from moecc.runtime.offload import profile as profiles

    budget = parse_memory(memory)
    assert budget is not None
    machines = [profiles.read(name) for name in profile.split(",")]
    with live_line(f"planning {model}", as_json):
        made = planning.run(model, budget, machines, quantize or None, trace or None, dtype)
    show(made, as_json, planning.print_plan)


@app.command(
    epilog="Examples: [b]moecc pack CHECKPOINT --quantize int4 -o packed[/b] · "
    "[b]moecc pack org/name -o packed --json[/b]"
)
def pack(
    model: Checkpoint,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write.", show_default=False)
    ],
    quantize: Quantize = "",
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
    show(done, as_json, packing.print_packed)
