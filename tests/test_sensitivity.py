"""Bits go where errors reach far: noise in one block of several copies of made-up text."""

from typing import Any

import pytest
import torch

from moecc.budgets import Matrices, choose
from moecc.runtime.errors import OptionError
from moecc.runtime.schemes.scheme import SCHEMES
from moecc.sensitivity import measure_sensitivity
from moecc.tiny import tiny_model


def blocks_of(model: Any) -> dict[str, torch.nn.Module]:
    return {
        path: one for path, one in model.named_modules() if path.endswith((".experts", "router"))
    }


def test_it_is_what_a_block_adds_to_the_stream() -> None:
    model: Any = tiny_model("qwen3_moe")
    blocks = blocks_of(model)
    with torch.no_grad():
        last = model.model.layers[1].mlp.experts.down_proj
        before = measure_sensitivity(model, blocks)
        last.mul_(10)
        louder = measure_sensitivity(model, blocks)
        last.zero_()
        silent = measure_sensitivity(model, blocks)
    first, second = blocks
    assert 2 * before[second] < louder[second]
    assert silent[second] < 1e-6 < silent[first]  # rounding depends on the batch


def test_the_model_is_as_it_was() -> None:
    model: Any = tiny_model("qwen3_moe").train()
    model.lm_head.eval()
    state, ids = torch.get_rng_state(), torch.arange(3, 9)[None]
    with torch.no_grad():
        want = model(ids).logits
        found = [measure_sensitivity(model, blocks_of(model)) for _ in range(2)]
        assert torch.equal(model(ids).logits, want)
    assert found[0] == found[1]
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_takes_no_tokens_is_refused() -> None:
    model = torch.nn.ModuleDict({"experts": torch.nn.Linear(4, 4)})
    with pytest.raises(OptionError, match=r"ModuleDict does not take them.*give a mapping such as"):
        measure_sensitivity(model, {"experts": model["experts"]})


def test_bits_go_where_errors_reach() -> None:
    weights = torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(0))
    one = Matrices(shape=(2, 32, 128), read=weights.__getitem__)
    names = [f"{block}.{part}_proj" for block in "ab" for part in ("gate_up", "down")]
    chosen = choose(dict.fromkeys(names, one), 4.5, {"a": 20.0, "b": 1.0})
    bits = {name: SCHEMES[scheme].bits_per_weight for name, scheme in chosen.items()}
    assert bits["a.down_proj"] > bits["b.down_proj"]
    assert bits["a.gate_up_proj"] > bits["b.gate_up_proj"]
    assert bits["b.down_proj"] >= bits["b.gate_up_proj"]
    assert sum(bits.values()) <= 4 * 4.6
