"""Run a checkpoint's model with one expert in memory at a time.

Experts are read from the checkpoint when a token needs them and computed in full precision by their
torch definition; kept are the sums of squares of their inputs, and nothing else.
"""

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
                self.spec, onto, slots, hidden, ids, weights, *matrices, seen=self._note
            )
        return onto.to(hidden.dtype)

    def _note(self, expert: int, inputs: torch.Tensor, activated: torch.Tensor) -> None:
        self.importance.first[expert] += inputs.float().square().sum(0)
        self.importance.second[expert] += activated.float().square().sum(0)
        self.importance.seen[expert] += len(inputs)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Do nothing."""


def load_one_by_one(folder: Path, dtype: torch.dtype | str) -> OneByOne:
    """Load the model of a checkpoint so; raises what loading raises."""
    weights = find_weights(folder)
    model, absent = load_model(folder, dtype, weights=weights)
    recipes = find_recipes(model, absent, weights, Options(), keep_codes=False)
    importance: dict[str, Importance] = {}
    for one, recipe in zip(absent, recipes, strict=True):
        spec = experts_spec(one.module, *one.tensors)
        importance[one.path] = Importance(
            first=torch.zeros(spec.experts, spec.hidden),
            second=torch.zeros(spec.experts, spec.intermediate),
            seen=torch.zeros(spec.experts, dtype=torch.int64),
        )
        lender = _Observer(recipe=recipe, spec=spec, importance=importance[one.path])
        put_in(one.module, list(one.names), list(one.tensors), lender)
    from moecc import backend, capture

    assert backend.moecc  # importing it installs the hooks
    capture.adopt(model, Options())
    return OneByOne(model=model, absent=absent, recipes=recipes, importance=importance)
