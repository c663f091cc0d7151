import pytest
import torch
from torch import fx

from moecc.passes.pattern import ANY, Match, Mutated, bind, call, cast, either, mutates, op_name


def last(function: object) -> fx.Node:
    return fx.symbolic_trace(function).graph.output_node().args[0]


def test_functions_methods_and_operators_are_named_alike() -> None:
    for function in (lambda x: torch.mul(x, 2), lambda x: x.mul(2), lambda x: x * 2):
        assert op_name(last(function)) == "mul"


def test_a_commutative_call_matches_either_order() -> None:
    pattern = call("mul", bind("a"), call("sigmoid", bind("a")))
    assert Match().find(pattern, last(lambda x: x * x.sigmoid()))
    assert Match().find(pattern, last(lambda x: torch.sigmoid(x) * x))


def test_a_name_bound_twice_stands_for_one_node() -> None:
    match = Match()
    assert not match.find(call("sub", bind("a"), bind("a")), last(lambda x, y: x - y))
    assert "expected a to be x" in match.reason


def test_a_failed_alternative_leaves_no_trace() -> None:
    wrong = call("mul", bind("a", call("exp", ANY)), call("tanh", ANY))
    right = call("mul", call("exp", bind("b")), ANY)
    match = Match()
    assert match.find(either(wrong, right), last(lambda x: x.exp() * x))
    assert set(match.bindings) == {"b"}


def test_casts_are_seen_through() -> None:
    assert Match().find(cast(call("exp", ANY)), last(lambda x: x.exp().float().to(torch.half)))


def test_an_in_place_call_is_found_among_the_users() -> None:
    def function(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        y.add_(b)
        return y

    match = Match()
    pattern = Mutated(call("exp", ANY), call("add_", ANY, bind("bias")))
    assert match.find(pattern, last(function))
    assert str(match.bindings["bias"]) == "b"
    assert not Match().find(pattern, last(lambda x: x.exp()))


def test_a_failure_tells_the_farthest_point() -> None:
    match = Match()
    pattern = call("sum", call("mul", call("exp", ANY), ANY))
    assert not match.find(pattern, last(lambda x: (x.tanh() * x.cos()).sum()))
    assert (match.reached, match.reason) == (2, "expected exp, found cos")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.add_(1), True),
        (lambda x: x.__setitem__(0, 1), False),
        (lambda x: torch.add(x, 1, out=x), True),
        (lambda x: x.add(1), False),
    ],
)
def test_knows_what_writes_in_place(function: object, expected: bool) -> None:
    nodes = fx.symbolic_trace(function).graph.find_nodes
    calls = [*nodes(op="call_method"), *nodes(op="call_function", target=torch.add)]
    assert [mutates(node) for node in calls[:1]] == [expected] * len(calls[:1])


@pytest.mark.parametrize("function", [lambda x: x.sum(1), lambda x: torch.sum(x, dim=1)])
def test_an_argument_may_be_given_by_position_or_by_name(function: object) -> None:
    assert Match().find(call("sum", ANY, dim=1), last(function))
    assert not Match().find(call("sum", ANY, dim=0), last(function))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.argsort(x, -1, True), "descending"),
        (lambda x: x.sum(1, True), "keepdim"),
        (lambda x: torch.arange(x, 2), "end"),
    ],
)
def test_an_argument_by_position_that_changes_the_call_is_refused(
    function: object, why: str
) -> None:
    name = op_name(last(function))
    dim = {"dim": 1} if name == "sum" else {}
    match = Match()
    assert not match.find(call(name, ANY, **dim), last(function))
    assert match.reason.endswith(f"is called with {why}")
