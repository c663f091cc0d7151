"""Make the experts of a trained model larger without changing what it computes.

Each intermediate neuron of an expert is repeated n times and its column of `down` divided by n: the
output is the same up to rounding, so routing is the trained model's own, and an expert has n times
the bytes. For measuring offloading, where routing decides and the shipped model is too small.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def widen(source: Path, folder: Path, times: int) -> Path:
    """Save the model in `source` with experts `times` as wide; returns `folder`."""
    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            gate, up = module.gate_up_proj.data.chunk(2, dim=1)
            rows = [one.repeat_interleave(times, dim=1) for one in (gate, up)]
            module.gate_up_proj.data = torch.cat(rows, dim=1)
            module.down_proj.data = module.down_proj.data.repeat_interleave(times, dim=2) / times
    config.moe_intermediate_size *= times
    model.config.moe_intermediate_size = config.moe_intermediate_size
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
