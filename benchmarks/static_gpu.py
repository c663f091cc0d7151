"""Compile every Triton kernel for GPUs that are not here, and print what each uses.

    python -m benchmarks.static_gpu --targets sm_80,sm_90 --weights bf16,int4 --json F --markdown F

For each kernel, tile and target: registers, spills, shared memory, occupancy, tensor core
instructions, asynchronous copies, the length of the loop that runs most; for the layer: launches,
bytes and FLOPs against the minimum. Beside vLLM's and triton_kernels'
(`benchmarks/static_peers.py`, `benchmarks/static_traffic.py`). Needs no GPU and no toolkit. The
record is what `tests/codegen/test_triton_golden.py` compares with. Exit status 1 if a kernel spills
or does not fit.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import static_report
from benchmarks.swiglu import swiglu_spec
from moecc.codegen import aot, low_bit
from moecc.codegen.gpus import GPUS
from moecc.codegen.machine_code import of_kind, size
from moecc.codegen.router_spec import RouterSpec
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_launches import Launch, plan_launches
from moecc.codegen.triton_router import plan_router
from moecc.runtime.schemes.scheme import SCHEMES, Schemes

SHAPE = {"hidden": 2048, "intermediate": 768, "experts": 128, "active": 8}
"""Of Qwen3-30B-A3B."""
INT4 = ("int4", "int4-g64", "int4-g128", "int4-g128-zeros")
WEIGHTS = ("bf16", *INT4, "mxfp4", "fp8", "fp8-b128", "int8")
ROUTERS = {
    "Qwen3's": RouterSpec(experts=128, active=8, scores="softmax", normalised=True),
    "DeepSeek-V3's": RouterSpec(
        experts=256,
        active=8,
        scores="sigmoid",
        bias=True,
        groups=8,
        kept=4,
        best=2,
        normalised=True,
        epsilon=1e-20,
        scale=2.5,
    ),
}
"""Logits in float32; in the column of weights."""
ALIKE = ("sm_86", "sm_89")
"""Without low-bit weights: their code is made as that of sm_80, their limits are sm_120's."""
RECORD = Path(__file__).parent / "results" / f"static-gpu-triton-{triton.__version__}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kernel on one target."""

    weights: str
    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int
    blocks: int
    """On an SM at a time."""
    occupancy: float
    products: str
    """The tensor core instruction."""
    product_count: int
    """Of them in the loop, or in all where it is unrolled."""
    async_copies: int
    descriptor_copies: int
    """Of them those of a tensor's block (TMA)."""
    loop: int
    """Instructions of the loop that runs most; 0 where it is unrolled."""
    instructions: int
    wide_loads: int
    """Loads of 16 bytes a thread."""

    @property
    def name(self) -> str:
        """Name the row among those of a target."""
        return f"{self.weights} {self.kernel}"


def make_spec(weights: str, shape: Mapping[str, int] = SHAPE) -> KernelSpec:
    """Make the spec of a layer with these weights."""
    spec = swiglu_spec(shape, torch.bfloat16, "cuda")
    if weights == "bf16":
        return spec
    schemes = Schemes(first=SCHEMES[weights], second=SCHEMES[weights])
    return low_bit.packed_kernel(spec, schemes, "triton").spec


def planned(weights: str, target: str) -> list[Launch]:
    """List the kernels of a spec that differ in more than a number on a target.

    Those that sort are the same for all weights, and for them a tile's height is only a number.
    """
    if weights in ROUTERS:
        return [plan_router(ROUTERS[weights])]
    launches = plan_launches(make_spec(weights), GPUS[target])
    heights = launches.grouped.values()
    persistent = [launches.persistent] if launches.persistent else []
    products = [launch for one in (*heights, *persistent) for launch in (one.gate_up, one.down)]
    found = [launches.decode_gate_up, launches.decode_down, *products]
    if weights == "bf16":
        first = next(iter(heights))
        found += [first.route, launches.count_experts, launches.scan_chunks, first.place_chunks]
        found.append(launches.reduce_terms)
    return found


def measure(weights: str, number: int, target: str) -> Row:
    """Compile one kernel, by its number in `planned`."""
    launch = planned(weights, target)[number]
    if weights in ROUTERS:
        found = aot.compile_router(ROUTERS[weights], launch, target)
    else:
        found = aot.compile_kernel(make_spec(weights), launch, target)
    code = found.loop if of_kind(found.loop, (found.products or "-",)) else found.instructions
    return Row(
        weights=weights,
        kernel=found.kernel,
        target=target,
        registers=found.registers,
        spilled=found.spilled,
        shared=found.shared,
        warps=found.warps,
        stages=launch.num_stages,
        blocks=found.blocks,
        occupancy=round(found.occupancy, 3),
        products=found.products,
        product_count=of_kind(code, (found.products,)) if found.products else 0,
        async_copies=found.async_copies,
        descriptor_copies=found.instructions.get("UTMALDG", 0),
        loop=size(found.loop),
        instructions=size(found.instructions),
        wide_loads=found.instructions.get("LDG.128", 0) + found.instructions.get("LDGSTS.128", 0),
    )


def targets_of(weights: str, targets: Iterable[str] = GPUS) -> list[str]:
    """List the targets for which kernels on these weights are compiled."""
    return [one for one in targets if weights in ("bf16", *ROUTERS) or one not in ALIKE]


def measure_all(weights: Iterable[str], targets: Sequence[str]) -> list[Row]:
    """Compile everything, a process for each core."""
    jobs = [
        (one, number, target)
        for one in weights
        for target in targets_of(one, targets)
        for number in range(len(planned(one, target)))
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(measure, *zip(*jobs, strict=True)))


def dump(record: dict[str, Any]) -> str:
    """Write a record as JSON, a kernel a line."""
    head = json.dumps({key: value for key, value in record.items() if key != "rows"})
    rows = ",\n".join(map(json.dumps, record["rows"]))
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(GPUS))
    kinds = ",".join((*WEIGHTS, *ROUTERS))
    parser.add_argument("--weights", default=kinds, help=f"of {kinds}, the last ones routers")
    parser.add_argument("--tokens", default="1,16,64,1024,4096", help="of the layer's traffic")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"the record is {RECORD.name}")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = measure_all(arguments.weights.split(","), arguments.targets.split(","))
    record = {
        "triton": triton.__version__,
        "shape": SHAPE,
        "tokens": [int(one) for one in arguments.tokens.split(",")],
        "rows": [asdict(row) for row in rows],
    }
    if arguments.json:
        arguments.json.write_text(dump(record))
    if arguments.markdown:
        arguments.markdown.write_text(static_report.page(record))
    print(static_report.page(record))
    if any(row.spilled or not row.blocks for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
