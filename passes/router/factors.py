"""Read what scores or weights are added to or multiplied with, where it is no plain number.

A tensor of the model (a bias, a learned scale), one value of it for each chosen expert, or random
numbers.
"""

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.steps import (
    Bias,
    Cap,
    Function,
    LearnedScale,
    Noise,
    Scale,
    Step,
)
from moecc.passes.router.values import (
    Unreadable,
    Values,
    plain_name,
    tensor,
    width,
)

_RANDOM = {
    "rand", "randn", "rand_like", "randn_like", "uniform", "normal", "exponential", "bernoulli",
    "log_normal", "sample", "rsample",
}  # fmt: skip


def read_bias(values: Values, node: Node) -> Read | None:
    """Read scores plus a value for each expert, or plus noise.

    Whether the bias stays in the weights is for the caller to say; until then it does not.
    """
    for source, other in _operands(values, node, ("add",)):
        if is_learned(values, other) and width(other) in (width(node), 1):
            return Bias(kept=False), source
        if is_random(values, other) and not is_random(values, source):
            return Noise("+"), source
    return None


def read_scale(values: Values, node: Node) -> Read | None:
    """Read scores times a tensor of the model, times noise, or over a learned temperature."""
    for source, other in _operands(values, node, ("mul",)):
        if is_learned(values, other):
            of = "learned scale" if _is_single(other) else "learned scales"
            return LearnedScale(of), source
        if is_random(values, other) and not is_random(values, source):
            return Noise("×"), source
    if plain_name(node) == "div":
        source, other = values.operand(node, 0), values.operand(node, 1, "other")
        if isinstance(source, Node) and isinstance(other, Node) and is_learned(values, other):
            return LearnedScale("1 / learned scale"), source
    return None


def read_scale_of_chosen(values: Values, node: Node, ids: Node) -> Read | None:
    """Read weights times the chosen experts' values of a learned vector."""
    for source, other in _operands(values, node, ("mul",)):
        table, index = looked_up(values, values.plain(other))
        if table is not None and index is ids and is_learned(values, table):
            return LearnedScale("learned scale of the expert"), source
    return None


def looked_up(values: Values, node: Node) -> tuple[Node | None, Node | None]:
    """Take `table[index]`, `table.index_select(0, index)` or an embedding apart."""
    name = plain_name(node)
    if name == "embedding":
        index, table = values.plain_operand(node, 0), values.plain_operand(node, 1, "weight")
    elif name in ("getitem", "index_select"):
        place = 1 if name == "getitem" else 2
        index, table = values.plain_operand(node, place, "index"), values.plain_operand(node, 0)
    else:
        return None, None
    if isinstance(index, Node) and isinstance(table, Node) and tensor(table) is not None:
        return table, index
    return None, None


def is_learned(values: Values, node: Node) -> bool:
    """Tell whether a node is a tensor of the model with one row, or a function of one.

    A graph's inputs other than the hidden state are parameters and buffers; those with a single
    row cannot be told from another input of that shape, and need not be.
    """
    found = tensor(node)
    if found is None or not found.is_floating_point() or (width(node) is None and found.dim()):
        return False
    if any(str(size) != "1" for size in found.shape[:-1]):
        return False
    leaves = [one for one in values.cone(node, limit=8) if not one.all_input_nodes]
    return bool(leaves) and all(leaf.op in ("placeholder", "get_attr") for leaf in leaves)


def is_random(values: Values, node: Node) -> bool:
    """Tell whether a node is computed from random numbers, a few steps back."""
    return any(plain_name(one) in _RANDOM for one in values.cone(node, limit=12))


def join(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Write `÷ c, tanh, × c` and `softplus, sqrt` as the one step that each of them is."""
    joined: list[Step] = []
    for step in steps:
        match (*joined[-2:], step):
            case (*_, Function("softplus"), Function("sqrt")):
                joined[-1:] = [Function("sqrt-softplus")]
            case (Scale(one, True), Function("tanh"), Scale(other, False)) if one == other:
                joined[-2:] = [Cap(one)]
            case _:
                joined.append(step)
    return tuple(joined)


def _operands(values: Values, node: Node, names: tuple[str, ...]) -> list[tuple[Node, Node]]:
    """Give both ways of seeing a sum or product as something and what it is changed by."""
    if plain_name(node) not in names or len(node.args) < 2:
        return []
    if node.kwargs.get("alpha") not in (None, 1):
        raise Unreadable(node, "add is called with alpha")
    left, right = values.operand(node, 0), values.operand(node, 1, "other")
    if not isinstance(left, Node) or not isinstance(right, Node):
        return []
    return [(left, right), (right, left)]


def _is_single(node: Node) -> bool:
    found = tensor(node)
    return found is not None and all(str(size) == "1" for size in found.shape)
