"""Read a block's weights back to the scores of the chosen experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from moecc.passes.router.chain import (
    Read,
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
from moecc.passes.router.choice import Choice, is_chosen
from moecc.passes.router.drops import read_dropped_weights
from moecc.passes.router.factors import read_bias, read_scale, read_scale_of_chosen
from moecc.passes.router.hot import read_hot, read_layout
from moecc.passes.router.masks import read_spread, selected, without_rest
from moecc.passes.router.rows import is_one, later_factors, read_column
from moecc.passes.router.steps import Applied, Beside, Capacity, Equal, Skip, Spread, Step
from moecc.passes.router.values import Unreadable, Values, argument, plain_name, width

_LATER = Applied("what becomes of each output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What was read."""

    steps: tuple[Step, ...]
    """From the chosen scores on."""
    trace: Trace | None
    """Where it was read; None for weights that are all alike."""
    taken: Node | None
    """[.., E] the scores of which the chosen ones were taken; None if that was not found."""


def once(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Leave a drop out that the same mask makes again; anything else may well come twice."""
    first = dict(reversed([(step, place) for place, step in enumerate(steps)]))
    return tuple(
        step
        for place, step in enumerate(steps)
        if not isinstance(step, Capacity | Skip) or first[step] == place
    )


@dataclass(slots=True, kw_only=True)
class WeightReader:
    """Readers of the weights of one choice."""

    values: Values
    choice: Choice
    scores: frozenset[Node] = frozenset()
    """[.., E] what the choice goes by, and what that was made of."""
    output: Node
    """The block's last node; weights are read as they are then."""
    over_all: bool = False
    """Weights stand at their experts' places, [T, E], and are taken at the chosen ones."""
    more: Sequence[Reader] = ()
    """Readers of what only this kind of weights has."""
    _hot: bool = field(default=False, init=False)
    """A mask of the chosen experts was met."""

    def read(self, weights: Node) -> Weights:
        """Read weights, or what the block's output is weighed with where the block is not."""
        found = self.trace(weights)
        if found.stopped is None or found.steps or not is_one(found.start):
            return self.described(found)
        for factor in later_factors(self.values, self.output):
            found = self.trace(factor)
            if found.stopped is None:
                return self.described(found, (_LATER,))
        return Weights(steps=(*self.choice.after, Equal()), trace=None, taken=None)

    def described(self, found: Trace, applied: Sequence[Step] = ()) -> Weights:
        """Describe a trace; a drop of ids and of their weights is one step."""
        after = self.choice.after
        if found.stopped is not None:
            return Weights(steps=(*after, found.unknown(), *found.steps), trace=found, taken=None)
        spread = selected(self.values, found.start, self.choice.ids)
        steps = without_rest((Spread(spread[1]), *found.steps) if spread else found.steps)
        if any(step not in steps for step in after):
            why = "ids are replaced and their weights are not"
            steps = (unknown(self.choice.dropped, why), *steps)
        taken = is_chosen(self.values, found.start, self.choice) or found.start
        return Weights(steps=(*once(steps), *applied), trace=found, taken=taken)

    def trace(self, weights: Node) -> Trace:
        """Read weights back, as they are when the block gives its output."""
        try:
            return self.trace_value(self.values.at(weights, self.output))
        except Unreadable as error:
            return Trace(steps=(), made=(), start=error.node, stopped=error)

    def trace_value(self, value: Node) -> Trace:
        """Read back from a node, as it is there."""
        self._hot = self.over_all
        readers = (
            read_log_softmax, read_function, read_constant, read_normalisation,
            self._scale_of_chosen, read_dropped_weights, self._one_hot, read_scale, read_bias,
            read_part, self._spread, self._beside, read_column, *self.more, self._layout,
        )  # fmt: skip
        return trace(self.values, value, readers, self._is_end)

    def _is_end(self, node: Node) -> bool:
        return is_chosen(self.values, node, self.choice) is not None or (
            self._hot and node in self.scores
        )

    def _scale_of_chosen(self, values: Values, node: Node) -> Read | None:
        return read_scale_of_chosen(values, node, self.choice.ids)

    def _spread(self, values: Values, node: Node) -> Read | None:
        return read_spread(values, node, self.choice.ids)

    def _one_hot(self, values: Values, node: Node) -> Read | None:
        found = read_hot(values, node, self.choice.ids)
        self._hot |= found is not None
        return found

    def _layout(self, values: Values, node: Node) -> Read | None:
        """Read a change of layout, which a mask that fits it has shown to be harmless."""
        return read_layout(values, node) if self._hot else None

    def _beside(self, values: Values, node: Node) -> Read | None:
        """Read the chosen scores with others of the router put beside them."""
        parts = argument(node, 0, "tensors")
        if plain_name(node) != "cat" or not isinstance(parts, tuple | list):
            return None
        for part in parts:  # pyright: ignore[reportUnknownVariableType]
            current = values.plain(values.at(part, node)) if isinstance(part, Node) else None
            if current is not None and is_chosen(values, current, self.choice) is not None:
                every, own = width(node), width(current)
                return (Beside(every - own), current) if every and own else None
        return None
