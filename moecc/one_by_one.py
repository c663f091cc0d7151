"""Run a checkpoint's model with one expert in memory at a time.

Experts are read from the checkpoint when a token needs them and computed in full precision by their
torch definition; kept are sums of squares or products of their inputs, and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from moecc.checkpoint.calibration import Importance
from moecc.checkpoint.recipes import Recipe, find_recipes, make_record
from moecc.checkpoint.weights import find_weights
from moecc.checkpoint.without_experts import Absent, load_model
from moecc.codegen.reference import add_experts_torch
from moecc.codegen.spec import KernelSpec
from moecc.passes.options import Options
from moecc.runtime.errors import OptionError
from moecc.runtime.offload.stand_in import put_in
from moecc.transformers_experts import experts_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class OneByOne:
    """A model that reads its experts when they are needed, and what it sees of their inputs."""

    model: nn.Module
    absent: Sequence[Absent]
    recipes: Sequence[Recipe]
    """Of records in the model's own layout."""
    importance: dict[str, Importance]
    """By the path of the experts' module; every call adds to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observer:
    """Lend a block its experts, and add up the squares of what they are given."""

    recipe: Recipe
    spec: KernelSpec
    importance: Importance
    schemes: None = None

    def run(
        self,
        add: object,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block as its definition does, with one expert in memory."""
        onto = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        layout = self.recipe.layout
        for expert in cast("list[int]", ids.unique().tolist()):
            slots = torch.full((self.recipe.experts,), -1)
            slots[expert] = 0
            record = make_record(self.recipe, expert).unsqueeze(0)
            tensors = layout.tensors(record)
            matrices = (tensors["gate_up"], tensors["down"], *biases)
            add_experts_torch(
                self.spec, onto, slots, hidden, ids, weights, *matrices, seen=self.importance.add
            )
        return onto.to(hidden.dtype)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Do nothing."""

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Do nothing."""


def load_one_by_one(folder: Path, dtype: torch.dtype | str, *, products: bool = False) -> OneByOne:
    """Load the model of a checkpoint so; `products` are those of `Importance`.

    Raises `OptionError` when products take more memory than there is, and what loading raises.
    """
    weights = find_weights(folder)
    model, absent = load_model(folder, dtype, weights=weights)
    recipes = find_recipes(model, absent, weights, Options(), keep_codes=False)
    specs = [experts_spec(one.module, *one.tensors) for one in absent]
    if products:
        _check_memory(sum(4 * e.experts * (e.hidden**2 + e.intermediate**2) for e in specs))
    importance: dict[str, Importance] = {}
    for one, recipe, spec in zip(absent, recipes, specs, strict=True):
        count, *sizes = spec.experts, spec.hidden, spec.intermediate
        first, second = (torch.zeros(count, size) for size in sizes)
        square = [torch.zeros(count, size, size) for size in sizes] if products else None
        importance[one.path] = Importance(
            first=first,
            second=second,
            seen=torch.zeros(count, dtype=torch.int64),
            products=None if square is None else (square[0], square[1]),
        )
        lender = _Observer(recipe=recipe, spec=spec, importance=importance[one.path])
        put_in(one.module, list(one.names), list(one.tensors), lender)
    from moecc import backend, capture

    assert backend.moecc  # importing it installs the hooks
    capture.adopt(model, Options())
    return OneByOne(model=model, absent=absent, recipes=recipes, importance=importance)


def _check_memory(size: int) -> None:
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text() if info.is_file() else "")
    if found and size > int(found[1]) * 1024:
        raise OptionError(
            f"compensate= holds {size:,} bytes of products of inputs, and "
            f"{int(found[1]) * 1024:,} are free; leave it out, and errors weigh by column"
        )
