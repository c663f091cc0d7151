"""Load a model through `moecc.load` together with a prompt for it, for commands that generate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecc.demo import check_length
from moecc.loading import load
from moecc.model_forms import find_weights_of
from moecc.models import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """A model and the ids [1, T] of its prompt."""

    folder: Path
    tokenizer: Any
    model: nn.Module
    ids: torch.Tensor


def load_prompted(
    name: str,
    prompt: str,
    new_tokens: int,
    dtype: str,
    options: dict[str, Any],
    tell: Callable[[str], None],
) -> Prompted:
    """Load, telling how far packing is, and check that prompt and new tokens fit.

    Raises what `moecc.load` does, and `ModelError` for a model without a tokenizer or with too
    short a context.
    """

    def packing(done: int, total: int) -> None:
        tell(f"packing experts: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    folder = find_weights_of(name)
    tokenizer = load_tokenizer(str(folder))
    model = load(folder, dtype=dtype, progress=packing, **options)
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    check_length(name, model, ids.shape[1] + new_tokens)
    return Prompted(folder=folder, tokenizer=tokenizer, model=model, ids=ids)
