"""Share the shipped model's experts among gloo processes: speed, bytes, and how even their load is.

    python -m benchmarks.parallel
    python -m benchmarks.parallel --ranks 2 --only ranks

Each process has one thread. `prefill` splits 8 texts of 64 tokens among ranks, `decode` runs one
token in all of them. Bytes are what all ranks sent for tokens and results in one prefill, a layer;
`least` is counted apart, from the routing: every token once to each other rank that computes for
it, with its choices, and one row back. Imbalance is the busiest rank's load over the mean of tokens
that the placement was not made by: every other window of the validation texts (the same kinds of
text), or their second half (other kinds).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moecc
from benchmarks.routing import REFERENCE, WINDOW, observe
from benchmarks.timing import machine, table
from moecc.parallel import report_shares
from moecc.runtime.parallel.placement import Placement, balanced, contiguous
from moecc.runtime.parallel.rows import Rows

TEXTS, LENGTH, TOKENS, DTYPE = 8, 64, 4096, torch.float32


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    parser.add_argument("--only", choices=("ranks", "balance"), help="one of the two tables")
    arguments = parser.parse_args()
    if arguments.only != "balance":
        print(f"{machine()}\n{table(runs(arguments.ranks, arguments.seconds))}\n")
    if arguments.only != "ranks":
        print(table(imbalances()))


def runs(ranks: str, seconds: float) -> list[list[str]]:
    """Start the processes of each row, one after another."""
    rows = [["ranks", "prefill tokens/s", "decode ms", "calls", "KB a layer", "least", "headers"]]
    for size in map(int, ranks.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_work, (size, folder, seconds), nprocs=size)
            rows.append((Path(folder) / "row").read_text().split("|"))
    return rows


def _work(rank: int, size: int, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/ranks"
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=wait)
    texts = torch.randint(3, 500, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        split = moecc.load(REFERENCE, dtype=DTYPE, expert_parallel=size, tokens="split")
        mine = texts.chunk(size)[rank]
        sent, least, headers, calls = count_bytes(split, mine, size)
        prefill = timed(lambda: split(mine), seconds)
        same = moecc.load(REFERENCE, dtype=DTYPE, expert_parallel=size)
        cache = same(texts[:1], use_cache=True).past_key_values

        def step() -> None:
            same(texts[:1, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        decode = timed(step, seconds)
    if rank == 0:
        kilobytes = [f"{one / 1e3:.1f}" for one in (sent, least, headers)]
        cells = [str(size), f"{TEXTS * LENGTH / prefill:,.0f}", f"{decode * 1e3:.2f}", calls]
        (Path(folder) / "row").write_text("|".join([*cells, *kilobytes]))
    dist.barrier()
    dist.destroy_process_group()


def timed(call: Callable[[], object], seconds: float) -> float:
    """Give the median of a call's times; all ranks make as many calls."""
    call()
    start = time.perf_counter()
    call()
    once = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(once, dist.ReduceOp.MAX)
    times: list[float] = []
    for _ in range(max(3, int(seconds / float(once)))):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def count_bytes(model: Any, mine: torch.Tensor, size: int) -> tuple[float, float, float, str]:
    """Run once; give bytes a layer as the exchange counted them, the least, headers, and calls."""
    seen: list[Rows] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: seen.append(Rows(*inputs)))
        for layer in model.model.layers
    ]
    before = report_shares(model)
    model(mine)
    after = report_shares(model)
    for hook in hooks:
        hook.remove()
    placement = contiguous(model.config.num_experts, size)
    hidden, ids, weights = seen[0]
    back = hidden.shape[1] * hidden.itemsize
    row = back + ids.shape[1] * (4 + weights.itemsize)
    least = sum(_pairs(rows.ids, placement) for rows in seen) * (row + back)
    sent, headers = (
        sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before)
        for name in ("sent_bytes", "header_bytes")
    )
    sums = torch.tensor([sent, least, headers], dtype=torch.double)
    dist.all_reduce(sums)
    sent, least, headers = (sums / len(seen)).tolist()
    return sent, least, headers, ", ".join(after[0].calls) if after else "none"


def _pairs(ids: torch.Tensor, placement: Placement) -> int:
    """Count, token by token, the other ranks that hold one of its experts."""
    here = dist.get_rank()
    return sum(
        len({placement.holders[expert][0] for expert in chosen} - {here}) for chosen in ids.tolist()
    )


def imbalances() -> list[list[str]]:
    """Place the shipped model's experts by half of the tokens, and judge by the other half."""
    _, chosen, _ = observe(TOKENS)
    experts = 1 + max(int(one.max()) for one in chosen)
    windows = [one.view(-1, WINDOW, one.shape[1]) for one in chosen]
    splits = {
        "same kinds": [(one[::2], one[1::2]) for one in windows],
        "other kinds": [tuple(one.chunk(2)) for one in windows],
    }
    ways: dict[str, Callable[[Sequence[float], int], Placement]] = {
        "contiguous": lambda load, ranks: contiguous(experts, ranks),
        "balanced": balanced,
        "1 spare a rank": lambda load, ranks: balanced(load, ranks, 1),
        "2 spare a rank": lambda load, ranks: balanced(load, ranks, 2),
    }
    rows = [["imbalance, mean and worst of blocks", "2 ranks", "4 ranks", "8 ranks"]]
    for kind, halves in splits.items():
        loads = [[_load(half, experts) for half in pair] for pair in halves]
        for name, place in ways.items():
            cells = [f"{kind}: {name}"]
            for ranks in (2, 4, 8):
                found = [place(first, ranks).imbalance(second) for first, second in loads]
                cells.append(f"{statistics.mean(found):.2f} {max(found):.2f}")
            rows.append(cells)
    return rows


def _load(ids: torch.Tensor, experts: int) -> list[float]:
    return torch.bincount(ids.reshape(-1), minlength=experts).double().tolist()


if __name__ == "__main__":
    main()
