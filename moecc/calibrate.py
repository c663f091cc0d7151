"""Run a model on a few prompts and note what its experts are given."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from moecc.checkpoint.calibration import Calibration
from moecc.models import load_tokenizer
from moecc.one_by_one import load_one_by_one
from moecc.runtime.errors import ModelError, OptionError

WINDOW = 512
"""Tokens that the model sees at once."""


def calibrate(
    folder: Path,
    prompts: Sequence[str | torch.Tensor],
    dtype: torch.dtype | str = "auto",
    *,
    compensate: bool = False,
) -> Calibration:
    """Run a checkpoint's model on prompts: texts, or token ids [T].

    With `compensate`, codes will make up for each other's errors (`schemes.compensate`). Raises
    `OptionError` without prompts of two tokens, `ModelError` when there is no tokenizer for texts,
    and what loading raises.
    """
    windows = [
        ids[start : start + WINDOW]
        for ids in _tokens(folder, prompts)
        for start in range(0, len(ids), WINDOW)
    ]
    windows = [one for one in windows if len(one) > 1]
    if not windows:
        raise OptionError(f"calibrate is {list(prompts)!r}; it takes prompts of two tokens or more")
    loaded = load_one_by_one(folder, dtype, products=compensate)
    with torch.no_grad():
        for ids in windows:
            loaded.model(input_ids=ids.unsqueeze(0), use_cache=False)
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(ids.to(torch.int64).numpy().tobytes() + b"|")
    return Calibration(
        blocks=loaded.importance, tokens=sum(map(len, windows)), digest=digest.hexdigest()[:12]
    )


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
