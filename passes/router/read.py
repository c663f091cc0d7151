"""Put the description of a block's router together.

The weights are read back to the chosen scores, the ids to what chose them, and both to the router's
matrix. What the choice alone sees (a bias, groups) is told from what the weights are made of.
"""

from torch.fx import Node

from moecc.passes.router.chain import (
    Reader,
    Trace,
    read_constant,
    read_function,
    read_log_softmax,
    read_normalisation,
    read_part,
    trace,
    unknown,
)
from moecc.passes.router.choice import Choice, read_choice
from moecc.passes.router.description import Router
from moecc.passes.router.factors import join, read_bias, read_scale
from moecc.passes.router.groups import read_groups
from moecc.passes.router.inputs import Hidden, input_steps, matrix_of, read_input
from moecc.passes.router.rows import ids_of_tokens, tokens_of_rows
from moecc.passes.router.sinkhorn import read_sinkhorn
from moecc.passes.router.steps import Bias, Function, Step, Weigh
from moecc.passes.router.values import Unreadable, Values, tensor
from moecc.passes.router.weights import WeightReader, Weights

_SCORES: tuple[Reader, ...] = (
    read_sinkhorn, read_log_softmax, read_function, read_constant, read_normalisation, read_groups,
    read_bias, read_scale, read_part,
)  # fmt: skip


def read_router(values: Values, hidden: Node, ids: Node, weights: Node, output: Node) -> Router:
    """Describe what makes the `ids` and `weights` of a block, as they are when `output` is made.

    What cannot be read is a step `Unknown`.
    """
    try:
        choice, before, after = read_parts(values, ids, weights, output)
        hidden = tokens_of_rows(values, values.at(hidden, output))
    except Unreadable as error:
        return Router(steps=(unknown(error.node, error.why),))
    return compose(values, hidden, choice, before, after)


def read_parts(
    values: Values, ids: Node, weights: Node, output: Node
) -> tuple[Choice, Trace | None, Weights]:
    """Read what chose the `ids`, what the choice goes by if it goes by scores, and the weights.

    Raises `Unreadable` at a node that is no known way to choose.
    """
    choice = read_choice(values, ids_of_tokens(values, values.at(ids, output)), weights)
    before = read_scores(values, choice.scores) if choice.scores is not None else None
    scores = before.nodes if before is not None else frozenset[Node]()
    reader = WeightReader(values=values, choice=choice, scores=scores, output=output)
    return choice, before, reader.read(weights)


def compose(
    values: Values, hidden: Node, choice: Choice, before: Trace | None, after: Weights
) -> Router:
    """Put what was read into the order of computation."""
    if before is None and after.taken is not None:  # the choice goes by no scores
        before = read_scores(values, after.taken)
    if before is None:
        return Router(steps=(choice.step, *after.steps))
    taken = after.taken or before.start
    shared = before.since(taken)
    own = () if shared is not None else (_weigh(values, taken, before),)
    told = _tell_bias(before.steps, shared or 0)
    source, reads = _read_source(values, before, Hidden.of(values, hidden))
    return Router(
        steps=join((*source, *told, choice.step, *own, *after.steps)),
        dtype=_dtype(before, after),
        reads=reads,
    )


def read_scores(values: Values, scores: Node) -> Trace:
    """Read scores of all experts back to the matrix that makes their logits."""
    return trace(values, scores, _SCORES, lambda node: matrix_of(values, node) is not None)


def _tell_bias(steps: tuple[Step, ...], shared: int) -> tuple[Step, ...]:
    """Tell a bias that the weights have too, among the first steps, from one of the choice."""
    return tuple(
        Bias(kept=place < shared) if isinstance(step, Bias) else step
        for place, step in enumerate(steps)
    )


def _weigh(values: Values, taken: Node, before: Trace) -> Weigh:
    """Describe scores that only the weights are made of."""
    own = read_scores(values, taken)
    if own.stopped is not None:
        return Weigh((own.unknown(), *own.steps))
    return Weigh(join(own.steps), other_matrix=own.start is not before.start)


def _read_source(values: Values, scores: Trace, hidden: Hidden) -> tuple[tuple[Step, ...], str]:
    """Describe the matrix and what it multiplies; name what that starts from, if not `hidden`."""
    found = matrix_of(values, scores.start) if scores.stopped is None else None
    if found is None:
        return (scores.unknown(),), ""
    source, logits = found
    read = read_input(values, source, hidden)
    if read.stopped is not None:
        return (read.unknown(), *read.steps, logits), ""
    reads = "" if read.start is hidden.node else read.start.name
    return (*input_steps(read, hidden), logits), reads


def _dtype(before: Trace, weights: Weights) -> str:
    """Name the dtype of the first function of the scores, or of the logits."""
    traces = [before] if weights.trace is None else [before, weights.trace]
    functions = [
        node
        for one in traces
        for step, node in zip(one.steps, one.made, strict=True)
        if isinstance(step, Function)
    ]
    value = tensor(functions[0] if functions else before.start)
    return "" if value is None else str(value.dtype).removeprefix("torch.")
