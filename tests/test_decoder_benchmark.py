"""The decoder benchmark: its contenders compute the same model."""

from pathlib import Path

import pytest
import torch

from benchmarks import decoder, llama_cpp

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
PROMPT = [5, 9, 33, 100, 7, 2, 250]


@pytest.fixture
def model():
    made = decoder.make_model(2, **TINY).float()
    for parameter in made.parameters():
        if parameter.dim() == 3:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made


def log_probabilities(model) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


def test_moecc_and_transformers_generate_the_same_tokens(model):
    options = {"inner": "eager", "strict": True}
    runs = [
        decoder._decoder(model, 32, lambda forward: forward),
        decoder._decoder(model, 32, torch.compile, backend="moecc", options=options),
    ]
    eager, ours = (run(PROMPT, 8) for run in runs)
    assert ours.tokens == eager.tokens
    assert len(set(ours.tokens)) > 2
    assert runs[1](PROMPT, 8).tokens == eager.tokens, "the cache is not empty again"


needs_llama = pytest.mark.skipif(
    not llama_cpp.installed(), reason="needs llama.cpp: pip install moecc[llama]"
)


@needs_llama
def test_llama_cpp_has_the_same_model(model, tmp_path: Path):
    theirs = llama_cpp.Decoder(llama_cpp.write(model, tmp_path / "f32", "F32", "F32"), 2, 64)
    found = theirs.log_probabilities(PROMPT, 320)
    torch.testing.assert_close(found, log_probabilities(model), rtol=0, atol=0.02)
    assert (
        theirs.run(PROMPT, 8).tokens == decoder._decoder(model, 32, lambda f: f)(PROMPT, 8).tokens
    )


@needs_llama
@pytest.mark.parametrize(
    ("experts", "others", "most"), [("Q8_0", "Q8_0", 0.1), ("Q4_0", "BF16", 1)]
)
def test_low_bit_files_are_the_model_rounded(model, tmp_path: Path, experts, others, most):
    theirs = llama_cpp.Decoder(llama_cpp.write(model, tmp_path / "q", experts, others), 2, 64)
    found = theirs.log_probabilities(PROMPT, 320)
    assert 0 < (found - log_probabilities(model)).abs().max() < most


def test_experts_that_are_alike_are_packed_as_each_would_be(model):
    from moecc.codegen import low_bit
    from moecc.runtime.schemes.scheme import INT8

    experts = model.model.layers[0].mlp.experts.down_proj
    plain, repeated = low_bit.pack_experts, experts[:1].repeat(3, 1, 1)
    with decoder.packing_the_first():
        assert torch.equal(low_bit.pack_experts(experts, INT8), plain(experts, INT8))
        assert torch.equal(low_bit.pack_experts(repeated, INT8), plain(repeated, INT8))


def test_a_profile_names_what_decoding_is_spent_on():
    def run(prompt, steps):
        for _ in range(steps):
            torch.ones(300, 300) @ torch.ones(300, 300)

    text = decoder.profile(run, 0, 4)
    assert text.splitlines()[0].split()[:2] == ["decode", "of"]
    assert any(
        line.split()[0] == "aten::mm" and line.split()[-1] == "4" for line in text.splitlines()
    )
