"""`moecc.compile` makes one graph for prompts of every length and one that decodes."""

from typing import Any

import pytest
import torch

import moecc
from moecc.records import all_records
from moecc.tiny import tiny_model
from tests.models import BatchedMoe, relative_error, tokens

PLAIN: dict[str, Any] = {"inner": "eager", "kernels": "torch"}
NEW = 4
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


def generated(model: Any, batch: int, length: int, **more: Any) -> torch.Tensor:
    prompt = torch.arange(3, 3 + batch * length).view(batch, length)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, **settings, **more)


def graphs_of(model: Any, shapes: list[tuple[int, int]], cache: str) -> list[int]:
    """Generate from prompts of some shapes, and count the graphs that each compiled."""
    plain, counts = tiny_model("qwen3_moe", num_hidden_layers=1), list[int]()
    for shape in shapes:
        before = len(all_records())
        got = generated(model, *shape, **CACHES[cache])
        assert torch.equal(got, generated(plain, *shape, **CACHES[cache]))
        counts.append(len(all_records()) - before)
    return counts


@pytest.mark.parametrize("cache", CACHES)
def test_one_graph_prefills_and_one_decodes_whatever_the_lengths(cache: str) -> None:
    model: Any = tiny_model("qwen3_moe", num_hidden_layers=1)
    assert moecc.compile(model, options=PLAIN) is model
    shapes = [(1, 7), (1, 13), (1, 5), (2, 9), (2, 6), (1, 11)]
    assert graphs_of(model, shapes, cache) == [2, 0, 0, 2, 0, 0], "a batch of one is torch's"


def test_one_token_first_does_not_make_longer_prompts_special() -> None:
    model: Any = moecc.compile(tiny_model("qwen3_moe", num_hidden_layers=1), options=PLAIN)
    shapes = [(1, 1), (1, 7), (1, 13), (1, 1)]
    apart = "a prompt of one token, a cache of one, a longer cache"
    assert graphs_of(model, shapes, "dynamic") == [3, 1, 0, 0], apart


def test_a_hand_written_module_keeps_the_names_of_its_weights() -> None:
    model, plain = BatchedMoe(), BatchedMoe()
    plain.load_state_dict(model.state_dict())
    before, names = len(all_records()), [*model.state_dict()]
    moecc.compile(model, options=PLAIN)
    with torch.no_grad():
        for count in (1, 5, 9, 1, 6):
            assert relative_error(model(x := tokens(count)), plain(x)) < 1e-2
    assert [*model.state_dict()] == names
    assert len(all_records()) - before == 2, "one token, and any number of them"


def test_a_function_is_given_back_compiled() -> None:
    model, before = BatchedMoe(), len(all_records())
    call = moecc.compile(lambda x: model(x), options=PLAIN)
    with torch.no_grad():
        for count in (4, 7):
            call(tokens(count))
    assert len(all_records()) - before == 1


def test_a_module_that_another_backend_compiles_is_compiled_by_ours() -> None:
    model, before = BatchedMoe(), len(all_records())
    wrapped = torch.compile(model, backend="eager")
    with torch.no_grad():
        wrapped(tokens(4))
        assert moecc.compile(wrapped, options=PLAIN) is model
        model(tokens(7))
    assert len(all_records()) - before == 1


def test_options_of_a_later_call_replace_those_of_an_earlier_one() -> None:
    model = BatchedMoe()
    with torch.no_grad():
        for kernels in ("torch", "native"):
            moecc.compile(model, options={"inner": "eager", "kernels": kernels})(tokens(4))
            assert all_records()[-1].options.kernels == kernels
        with pytest.raises(moecc.MoeccError, match="kernels"):
            moecc.compile(model, options={"kernels": "none"})
        before = len(all_records())
        model(tokens(9))
    assert len(all_records()) == before, "what was compiled stays"


def test_refuses_options_as_torch_compile_does() -> None:
    with pytest.raises(moecc.MoeccError, match="outlines"):
        moecc.compile(BatchedMoe(), options={"outlines": True})


def test_layers_are_compiled_once_for_every_length() -> None:
    plain = tiny_model("qwen3_moe", num_hidden_layers=4, use_cache=False)
    model: Any = tiny_model("qwen3_moe", num_hidden_layers=4, use_cache=False)
    moecc.compile(model, options=PLAIN | {"inner": "aot_eager", "outline": True}, fullgraph=True)
    with torch.no_grad():
        for length in (7, 11):
            ids = torch.arange(3, 3 + length).unsqueeze(0)
            torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    (graph,) = moecc.report(model).graphs
    assert [len(one["paths"]) for one in graph.callees] == [4]
