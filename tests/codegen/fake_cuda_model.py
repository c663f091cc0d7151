"""Compile a transformers model whose tensors claim to be on a CUDA device, and print what ran.

    python -m tests.codegen.fake_cuda_model qwen3_moe FOLDER [int4]

A process of its own: the device guard that it loads stays for good.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moecc.codegen.emit import choose
from moecc.codegen.gpus import GPUS
from moecc.codegen.triton_costs import plans
from moecc.codegen.triton_emitter import emit
from moecc.passes.fuse_experts import kernel_spec
from moecc.records import all_records
from moecc.tiny import tiny_model
from tests.codegen.triton_cases import make_inputs, tensors
from tests.codegen.triton_dry_run import dry_run

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compile the device guard against torch's own headers."""
    torch_folder, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    include, lib = torch_folder / "include", torch_folder / "lib"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", abi, f"-I{include}", f"-L{lib}", "-lc10"]
    source = str(HERE / "fake_cuda.cpp")
    subprocess.run(["c++", source, *flags, f"-Wl,-rpath,{lib}", "-o", str(library)], check=True)
    return library


def move(model: torch.nn.Module) -> None:
    """Put fake tensors on a CUDA device in the place of a model's own."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
                    )
                    wrap = isinstance(tensor, torch.nn.Parameter)
                    held[name] = torch.nn.Parameter(fake, requires_grad=False) if wrap else fake


def main() -> None:
    kind, folder, *quantize = sys.argv[1:]
    ctypes.CDLL(str(build(Path(folder))))
    model = tiny_model(kind, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        move(model)
        options = {"inner": "eager", "strict": True, "quantize": quantize[0] if quantize else None}
        compiled = torch.compile(model, backend="moecc", options=options, dynamic=True)
        devices = set()
        for tokens in (9, 16, 31):
            ids = torch.empty(2, tokens, dtype=torch.long, device="cuda")
            mask = torch.ones_like(ids)
            devices.add(str(compiled(ids, attention_mask=mask, use_cache=False).logits.device))
    records = all_records()
    blocks = [block for record in records for block in record.blocks]
    spec, paths = kernel_spec(blocks[0]), {block.path for block in blocks}
    lowerings = [one for record in records for one in record.lowerings]
    # The first plan is chosen for few tokens; tiles of other heights run the same kernels.
    _, grouped, *_, persistent = plans(spec, GPUS["sm_90"], blocks[0].active)
    with dry_run(90) as launches:
        for plan in (None, grouped, persistent):
            x = make_inputs(spec, 4, blocks[0].active)
            emit(spec, plan).run(*tensors(x))
    kernel, declined = choose(spec, schemes=blocks[0].schemes)
    found = {
        "devices": sorted(devices),
        "graphs": len(records),
        "blocks": len(blocks),
        "kernels": sorted({one.kernel for one in lowerings if one.block in paths}),
        "shared": sum(
            "shared experts" in step.note and step.rewrites for one in records for step in one.steps
        ),
        "routers": sorted({block.router_kernel for block in blocks}),
        "expected": kernel.key,
        "misses": [miss.why for record in records for miss in record.misses] + [*declined],
        "launches": sorted({name for name, _ in launches.launched}),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
