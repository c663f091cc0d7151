"""Blocks that call their experts from Python become one call, and everything else stays."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import moecc
from moecc import capture
from moecc.passes.options import Options
from moecc.runtime.errors import InputError, StrictError
from tests.loops import EXPERTS, HIDDEN, LOOPS, Glu, HitLoop, WhereLoop, inputs
from tests.models import relative_error

Kind = Callable[[], nn.Module]


def same(got: Any, expected: Any) -> None:
    leaves, form = tree_flatten(got)
    wanted, wanted_form = tree_flatten(expected)
    assert form == wanted_form
    for one, other in zip(leaves, wanted, strict=True):
        assert one is other or relative_error(one, other) < 1e-5


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="moecc", fullgraph=True, options={"inner": "eager", **options}
    )


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_becomes_one_block_in_one_graph(kind: Kind) -> None:
    model = nn.Sequential(kind()).eval()
    batches = [inputs(kind, *sizes) for sizes in ((2, 9), (3, 5), (5, 7), (4, 33), (1, 1))]
    wanted = [model(x) for x in batches]
    run = compiled(model)
    for x, result in zip(batches, wanted, strict=True):
        same(run(x), result)
    report = moecc.report(model)
    assert {len(graph.blocks) for graph in report.graphs} == {1}
    assert len(report.graphs) <= 3  # static, dynamic, and one token
    assert not [miss for graph in report.graphs for miss in graph.misses]


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_runs_our_kernel_outside_dynamo(kind: Kind) -> None:
    model = kind().eval()
    batches = [inputs(kind, *sizes) for sizes in ((2, 9), (1, 1))]
    expected = [model(x) for x in batches]
    capture.adopt(model, Options())
    for x, result in zip(batches, expected, strict=True):
        same(model(x), result)
    eager = moecc.report(model).eager
    assert eager is not None
    assert (eager.modules, eager.calls, eager.own_calls) == (1, 2, 0)


def test_blocks_that_are_alike_each_use_their_own_weights() -> None:
    model = nn.Sequential(WhereLoop(), WhereLoop()).eval()
    x = torch.randn(11, HIDDEN)
    expected = model(x)
    same(compiled(model)(x), expected)


def test_inductor_compiles_what_is_left() -> None:
    model = WhereLoop().eval()
    x = torch.randn(2, 5, HIDDEN)
    expected = model(x)
    same(compiled(model, inner="inductor")(x), expected)


def test_half_precision_agrees_within_rounding() -> None:
    model = WhereLoop().to(torch.bfloat16).eval()
    x = torch.randn(40, HIDDEN, dtype=torch.bfloat16)
    expected = model(x)
    assert relative_error(compiled(model)(x), expected) < 2e-2
    assert len(moecc.report(model).graphs[0].blocks) == 1


# What stays as it was.


def test_other_instances_and_other_backends_get_the_loop() -> None:
    ours, other = WhereLoop().eval(), WhereLoop().eval()
    x = torch.randn(7, HIDDEN)
    expected = ours(x), other(x)
    theirs = torch.compile(ours, backend="eager")
    same(theirs(x), expected[0])
    run = compiled(ours)
    same(run(x), expected[0])
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(gm.code)
        return gm

    same(torch.compile(ours, backend=backend)(x), expected[0])
    assert seen
    assert not any("moecc" in code for code in seen)
    same(other(x), expected[1])
    eager = moecc.report(other).eager
    assert eager is None


def test_a_released_model_has_its_own_forward_again() -> None:
    class Fresh(WhereLoop):
        forward = WhereLoop.forward

    own = Fresh.forward
    model = Fresh().eval()
    capture.adopt(model, Options())
    assert Fresh.forward is not own
    capture.release(model)
    assert Fresh.forward is own
    assert "_moecc" not in model.__dict__


def test_parameters_keep_their_names_values_and_count() -> None:
    model = WhereLoop().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture.adopt(model, Options())
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_is_a_model_that_was_not_adopted(way: str) -> None:
    model = WhereLoop().eval()
    x = torch.randn(5, HIDDEN)
    expected = model(x)
    capture.adopt(model, Options())
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    same(twin(x), expected)
    assert moecc.report(twin).eager is None
    twin.pool[0].a.weight.zero_()
    same(model(x), expected)


def test_new_weights_are_the_ones_that_run() -> None:
    model, other = WhereLoop().eval(), WhereLoop().eval()
    x = torch.randn(9, HIDDEN)
    run = compiled(model)
    run(x)
    model.load_state_dict(other.state_dict())
    same(run(x), other(x))
    model.pool[2].a.weight.mul_(3)
    other.pool[2].a.weight.mul_(3)
    same(run(x), other(x))


@pytest.mark.parametrize("road", ["compiled", "eager"])
def test_weights_that_moved_away_are_fetched(road: str) -> None:
    model, other = WhereLoop().eval(), WhereLoop().eval()
    x = torch.randn(9, HIDDEN)
    run = compiled(model)
    run(x)
    run = run if road == "compiled" else model
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    same(run(x), other(x))
    for expert, twin in zip(model.pool, other.pool, strict=True):
        expert.c.weight.data = twin.c.weight.data = torch.randn_like(twin.c.weight)
    same(run(x), other(x))


def test_an_expert_put_in_the_place_of_another_is_an_error_that_says_so() -> None:
    model = WhereLoop().eval()
    x = torch.randn(9, HIDDEN)
    run = compiled(model)
    run(x)
    model.pool[1] = Glu()
    with pytest.raises(InputError, match=r"replaced after torch.compile; call torch.compile"):
        model(x)


def test_an_attribute_that_changed_is_obeyed() -> None:
    model, twin = WhereLoop().eval(), WhereLoop().eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(9, HIDDEN)
    run = compiled(model)
    same(run(x), twin(x))
    model.top_k = twin.top_k = 3
    same(model(x), twin(x))
    eager = moecc.report(model).eager
    assert eager is not None
    assert "top_k" in eager.reasons[0]


def test_calls_that_were_not_observed_run_the_models_own_code() -> None:
    model = HitLoop().eval()
    x = torch.randn(2, 4, HIDDEN)
    expected = model(x)
    capture.adopt(model, Options())
    same(model(x=x), expected)
    seen: list[int] = []
    model.score.register_forward_hook(lambda *_: seen.append(1))
    same(model(x), expected)
    assert seen
    eager = moecc.report(model).eager
    assert eager is not None
    assert eager.calls == 0


def test_gradients_are_not_lost() -> None:
    model = WhereLoop().eval()
    capture.adopt(model, Options())
    with torch.enable_grad():
        model(torch.randn(9, HIDDEN)).sum().backward()
    assert model.score.weight.grad is not None


def test_a_model_in_training_mode_is_left_alone_with_a_reason() -> None:
    model = WhereLoop().train()
    x = torch.randn(9, HIDDEN)
    expected = model(x)
    run = torch.compile(model, backend="moecc", options={"inner": "eager"})
    same(run(x), expected)
    assert moecc.report(model).eager is None


def test_strict_refuses_a_loop_that_stays() -> None:
    model = Skewed().eval()
    run = torch.compile(model, backend="moecc", options={"inner": "eager", "strict": True})
    with pytest.raises(Exception, match="its experts stay a loop") as caught:
        run(torch.randn(9, HIDDEN))
    assert StrictError.__name__ in repr(caught.value) + str(caught.value)


class Skewed(WhereLoop):
    """The last expert counts twice."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(inputs)
        out = torch.zeros_like(inputs)
        for number, expert in enumerate(self.pool):
            token, slot = torch.where(ids == number)
            factor = 2 if number == EXPERTS - 1 else 1
            out.index_add_(0, token, factor * expert(inputs[token]) * weights[token, slot, None])
        return out


def test_what_only_looks_alike_is_left_alone_and_right() -> None:
    model = Skewed().eval()
    x = torch.randn(9, HIDDEN)
    expected = model(x)
    run = torch.compile(model, backend="moecc", options={"inner": "eager"})
    same(run(x), expected)
    report = moecc.report(model)
    assert not any(graph.blocks for graph in report.graphs)
    whys = [miss["why"] for graph in report.graphs for miss in graph.misses]
    assert [why for why in whys if why.startswith("its experts stay a loop: ")]
