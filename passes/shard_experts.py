"""Share each block's experts among the ranks of a torch.distributed group.

Needs: blocks.  Adds: nothing.  Graph: the experts' call says which ranks work on it.

    moecc.experts(hidden, ids, weights, gate_up, ..., kernel)
→
    moecc.experts(hidden, ids, weights, gate_up, ..., kernel, across="split over 4 ranks of 0")

The call stays one node of known shape: how many rows a rank gets is known when tokens are routed,
and is nobody's business but the operator's (`moecc.runtime.parallel.exchange`,
`docs/decisions/0033`). Off without `expert_parallel`, and for one rank.
"""

from functools import cache, partial

from moecc.codegen.collective_cost import few_tokens
from moecc.passes.ir import Outcome, Program
from moecc.passes.options import Options
from moecc.runtime.parallel.exchange import (
    Exchange,
    Tokens,
    install_exchange,
    refuse_more_ranks,
)
from moecc.runtime.parallel.ranks import Ranks, ranks_of
from moecc.runtime.parallel.wire import measure


def shard_experts(program: Program, options: Options) -> Outcome:
    """Have every block's call go across ranks.

    Raises `OptionError` where ranks differ in what they compile, or outnumber experts.
    """
    exchange = exchange_of(options)
    if exchange is None:
        return Outcome(program=program, note="off: every expert is computed here")
    nodes = program.nodes()
    rewrites = 0
    for block in program.blocks:
        refuse_more_ranks(exchange.ranks, block.experts, block.path)
        shapes = (block.experts, block.active, block.hidden_size, block.intermediate)
        what = f"{shapes} {block.dtype} {block.activation} {options.schemes(block.path)}"
        exchange.ranks.agree({"experts, active, hidden size, intermediate and dtype": what})
        node = nodes[block.output]
        rewrites += node.kwargs.get("across") != exchange.key
        node.kwargs = {**node.kwargs, "across": exchange.key}
    return Outcome(program=program, rewrites=rewrites, note=exchange.key)


def exchange_of(options: Options) -> Exchange | None:
    """Find the ranks that the options mean; None where there is nobody to share with.

    Raises `OptionError` where there is no such group.
    """
    if options.expert_parallel is None:
        return None
    ranks = ranks_of(options.expert_parallel)
    if ranks.size == 1:
        return None
    return _exchange(ranks, options.tokens)


@cache
def _exchange(ranks: Ranks, tokens: Tokens) -> Exchange:
    """Measure the link, once, and make the exchange callable."""
    few = partial(few_tokens, measure(ranks))
    exchange = Exchange(ranks=ranks, tokens=tokens, few=few)
    install_exchange(exchange)
    return exchange
