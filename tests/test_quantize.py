"""`quantize=`: low-bit copies of experts, on every road, for every layout of weights."""

from statistics import median
from typing import Any

import pytest
import torch

import moecc
from moecc.codegen.emit import choose
from moecc.passes.options import Options
from moecc.runtime.errors import OptionError
from moecc.runtime.schemes.packing import dequantize, quantize
from moecc.runtime.schemes.scheme import INT8, SCHEMES, Schemes
from moecc.tiny import tiny_model
from tests.codegen.native_cases import make_spec
from tests.loops import WhereLoop
from tests.models import relative_error

PROMPT = torch.arange(3, 27).reshape(2, 12)


def rounded(model: Any, scheme: str, turned: bool = False) -> Any:
    """Replace expert weights by what their codes stand for, in the model's own code."""
    for module in model.modules():
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name, None)
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 3:
                for one in weight.data:
                    rows = one.T if turned else one
                    known = dequantize(quantize(rows, SCHEMES[scheme]), SCHEMES[scheme])
                    rows.copy_(known[:, : rows.shape[1]])
    return model


def notes(model: Any) -> tuple[str, ...]:
    return moecc.report(model).notes


def test_what_is_not_low_bit_is_not_said_of_full_weights() -> None:
    model: Any = tiny_model("qwen3_moe")
    torch.compile(model, backend="moecc")
    assert not any("low-bit" in one for one in notes(model))


@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_computes_with_its_rounded_weights(family: str, scheme: str) -> None:
    want = rounded(tiny_model(family), scheme, turned=family == "gpt_oss")
    model: Any = tiny_model(family)
    compiled = torch.compile(
        model, backend="moecc", options={"inner": "eager", "quantize": scheme, "strict": True}
    )
    with torch.no_grad():
        expected = want(PROMPT).logits
        for road in (compiled, model):  # in a graph, and outside
            got = road(PROMPT).logits.flatten(0, 1)
            errors = [
                relative_error(*pair) for pair in zip(got, expected.flatten(0, 1), strict=True)
            ]
            assert median(errors) < 0.02  # of a token: rounded inputs may flip a choice of another
    (graph,) = moecc.report(model).graphs
    name = str(SCHEMES[scheme])
    assert {block["kernel"].split(":")[0] for block in graph.blocks} == {f"native {name}"}
    assert any("MB less to read" in one["note"] for one in graph.passes)
    assert any(
        "routers, norms, attention and shared experts are not" in one for one in notes(model)
    )


def test_expert_modules_are_quantized_too() -> None:
    model = WhereLoop().eval()
    x = torch.randn(7, 16)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(
            model, backend="moecc", options={"inner": "eager", "quantize": "int8"}
        )
        for road in (compiled, model):
            assert 1e-5 < relative_error(road(x), want) < 0.05


def test_written_weights_are_packed_again() -> None:
    model: Any = tiny_model("qwen3_moe")
    compiled = torch.compile(model, backend="moecc", options={"inner": "eager", "quantize": "int8"})
    with torch.no_grad():
        before = compiled(PROMPT).logits
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(-1.0)
        after = compiled(PROMPT).logits
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(-1.0)
        assert torch.equal(compiled(PROMPT).logits, before)
    assert not torch.allclose(before, after)


def test_blocks_may_have_different_schemes() -> None:
    model: Any = tiny_model("qwen3_moe")
    options = {"inner": "eager", "quantize": {"*.0.mlp*": "int8", "*": "int4-g64"}}
    compiled = torch.compile(model, backend="moecc", options=options)
    with torch.no_grad():
        inside, outside = compiled(PROMPT).logits, model(PROMPT).logits
    assert relative_error(inside, outside) < 1e-5
    (graph,) = moecc.report(model).graphs
    kernels = [block["kernel"].split(":")[0] for block in graph.blocks]
    assert kernels == ["native int8", "native int4-g64"]


def test_the_products_of_a_block_may_have_different_schemes() -> None:
    want: Any = tiny_model("qwen3_moe")
    for layer in want.model.layers:
        for name, scheme in (("gate_up_proj", "int4"), ("down_proj", "int8")):
            for one in getattr(layer.mlp.experts, name).data:
                known = dequantize(quantize(one, SCHEMES[scheme]), SCHEMES[scheme])
                one.copy_(known[:, : one.shape[1]])
    model: Any = tiny_model("qwen3_moe")
    options = {
        "inner": "eager",
        "kernels": "torch",
        "quantize": {"*.down_proj": "int8", "*": "int4"},
    }
    compiled = torch.compile(model, backend="moecc", options=options)
    with torch.no_grad():
        for road in (compiled, model):
            assert relative_error(road(PROMPT).logits, want(PROMPT).logits) < 1e-5
    (graph,) = moecc.report(model).graphs
    assert {block["kernel"].split(":")[0] for block in graph.blocks} == {"torch int4-g32 + int8"}


def test_a_block_is_quantized_whole_or_the_report_says_why_not() -> None:
    model: Any = tiny_model("qwen3_moe")
    options = {"inner": "eager", "quantize": {"*.down_proj": "int8"}}
    compiled = torch.compile(model, backend="moecc", options=options)
    with torch.no_grad():
        want = tiny_model("qwen3_moe")(PROMPT).logits
        assert relative_error(compiled(PROMPT).logits, want) < 1e-5
    assert "match only down_proj of it, and a block is quantized whole" in str(
        moecc.report(model).to_dict()
    )


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"*.gate_proj": "int8", "*": "int4"}, "gate_proj int8 and .*up_proj int4-g32"),
        ({"*.up_proj": "int8", "*.down_proj": "int4"}, "gate_proj nothing and .*up_proj int8"),
    ],
)
def test_gate_and_up_have_one_scheme(patterns: dict[str, str], said: str) -> None:
    options = Options.parse({"quantize": patterns})
    with pytest.raises(OptionError, match=said):
        options.schemes("model.layers.0.mlp.experts")


@pytest.mark.parametrize(
    "patterns",
    [
        {"*.gate_up_proj": "int8", "*.down_proj": "int4"},
        {"*.gate_proj": "int8", "*.up_proj": "int8", "*": "int4"},
        {"model.layers.0.mlp.experts.down_proj": "int4", "model.layers.0.mlp.experts": "int8"},
    ],
)
def test_ways_to_name_a_projection(patterns: dict[str, str]) -> None:
    found = Options.parse({"quantize": patterns}).schemes("model.layers.0.mlp.experts")
    assert found == Schemes(first=INT8, second=SCHEMES["int4"])


def test_a_budget_becomes_a_scheme_for_each_projection() -> None:
    model: Any = tiny_model("qwen3_moe")
    with torch.no_grad():  # easy to round: of a group, all weights are equal
        model.model.layers[0].mlp.experts.down_proj.fill_(0.5)
    options = {"inner": "eager", "quantize": "5bpw", "strict": True}
    compiled = torch.compile(model, backend="moecc", options=options)
    with torch.no_grad():
        inside, outside = compiled(PROMPT).logits, model(PROMPT).logits
    assert relative_error(inside, outside) < 1e-5
    report = moecc.report(model)
    kernels = [block["kernel"].split(":")[0] for block in report.graphs[0].blocks]
    first, second = (name.removeprefix("native ") for name in kernels)
    assert first.endswith(" + int2-g64-zeros")
    assert "int2" not in second
    assert options["quantize"] == "5bpw"  # what the user holds is not written to


def test_a_budget_needs_the_model() -> None:
    model: Any = tiny_model("qwen3_moe")
    compiled = torch.compile(
        lambda x: model(x).logits, backend="moecc", options={"quantize": "4.5bpw"}
    )
    with torch.no_grad(), pytest.raises(Exception, match=r"give torch\.compile the model itself"):
        compiled(PROMPT)
    with pytest.raises(OptionError, match="no fused expert weights in this model"):
        torch.compile(torch.nn.Linear(4, 4), backend="moecc", options={"quantize": "4.5bpw"})
    with pytest.raises(OptionError, match=r"'2\.1bpw' is too small: the smallest schemes take"):
        torch.compile(model, backend="moecc", options={"quantize": "2.1bpw"})


@pytest.mark.parametrize("bad", ["2bpw", "9bpw", "bpw", "-3bpw", "4.5 bpw"])
def test_bits_beyond_what_schemes_have_are_refused(bad: str) -> None:
    with pytest.raises(OptionError, match=r"above 2 and up to 8\.5"):
        Options.parse({"quantize": bad})


def test_the_reference_kernel_is_the_weights_that_codes_stand_for() -> None:
    model: Any = tiny_model("qwen3_moe")
    options = {"inner": "eager", "quantize": "int4", "kernels": "torch"}
    compiled = torch.compile(model, backend="moecc", options=options)
    with torch.no_grad():
        expected = rounded(tiny_model("qwen3_moe"), "int4")(PROMPT).logits
        assert relative_error(compiled(PROMPT).logits, expected) < 1e-5


def test_what_no_kernel_reads_keeps_its_dtype_and_says_so() -> None:
    spec = make_spec("silu", torch.float32)
    kernel, declined = choose(spec, "triton", Schemes(first=INT8, second=INT8))
    assert kernel.emitter == "torch"
    assert kernel.spec.schemes is None
    assert ["int8" in why for why in declined] == [True, False]
    kernel, declined = choose(
        make_spec("silu", torch.float64), "torch", Schemes(first=INT8, second=INT8)
    )
    assert kernel.emitter == "torch"
    assert "float64 weights are not quantized" in declined[0]
