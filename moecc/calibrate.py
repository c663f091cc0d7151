"""Run a model on a few prompts and note what its experts are given.

Experts are read from the checkpoint when a token needs them, one at a time, and computed in full
precision by their torch definition; kept are the sums of squares of their inputs, and nothing else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from moecc.checkpoint.calibration import Calibration, Importance
from moecc.checkpoint.recipes import Recipe, find_recipes, make_record
from moecc.checkpoint.weights import find_weights
from moecc.checkpoint.without_experts import load_model
from moecc.codegen.reference import add_experts_torch
from moecc.codegen.spec import KernelSpec
from moecc.models import load_tokenizer
from moecc.passes.options import Options
from moecc.runtime.errors import ModelError, OptionError
from moecc.runtime.offload.stand_in import put_in
from moecc.transformers_experts import experts_spec

WINDOW = 512
"""Tokens that the model sees at once."""


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


def calibrate(
    folder: Path, prompts: Sequence[str | torch.Tensor], dtype: torch.dtype | str = "auto"
) -> Calibration:
    """Run a checkpoint's model on prompts: texts, or token ids [T].

    Raises `OptionError` without prompts of two tokens, `ModelError` when there is no tokenizer for
    texts, and what loading raises.
    """
    windows = [
        ids[start : start + WINDOW]
        for ids in _tokens(folder, prompts)
        for start in range(0, len(ids), WINDOW)
    ]
    windows = [one for one in windows if len(one) > 1]
    if not windows:
        raise OptionError(f"calibrate is {list(prompts)!r}; it takes prompts of two tokens or more")
    weights = find_weights(folder)
    model, absent = load_model(folder, dtype, weights=weights)
    recipes = find_recipes(model, absent, weights, Options(), keep_codes=False)
    blocks: dict[str, Importance] = {}
    for one, recipe in zip(absent, recipes, strict=True):
        spec = experts_spec(one.module, *one.tensors)
        blocks[one.path] = Importance(
            first=torch.zeros(spec.experts, spec.hidden),
            second=torch.zeros(spec.experts, spec.intermediate),
            seen=torch.zeros(spec.experts, dtype=torch.int64),
        )
        lender = _Observer(recipe=recipe, spec=spec, importance=blocks[one.path])
        put_in(one.module, list(one.names), list(one.tensors), lender)
    from moecc import backend, capture

    assert backend.moecc  # importing it installs the hooks
    capture.adopt(model, Options())
    with torch.no_grad():
        for ids in windows:
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(ids.to(torch.int64).numpy().tobytes() + b"|")
    return Calibration(blocks=blocks, tokens=sum(map(len, windows)), digest=digest.hexdigest()[:12])


def check_calibrates(quantize: object) -> None:
    """Raise `OptionError` if nothing is rounded that calibration could help."""
    if quantize is None:
        raise OptionError("calibrate weighs errors of rounding; give quantize= too, such as 'int4'")


def _tokens(folder: Path, prompts: Sequence[str | torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(prompts, str):
        raise OptionError("calibrate is a text; it takes a list of them")
    if all(isinstance(one, torch.Tensor) for one in prompts):
        return [one.flatten() for one in prompts if isinstance(one, torch.Tensor)]
    tokenizer = load_tokenizer(str(folder))
    found = [tokenizer(one, return_tensors="pt", verbose=False).input_ids[0] for one in prompts]
    if any(prompts) and not any(map(len, found)):  # transformers makes one of nothing
        raise ModelError(
            f"{str(folder)!r} has no tokenizer for calibration texts; give token ids as tensors"
        )
    return found
