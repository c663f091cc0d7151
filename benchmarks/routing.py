"""Tell what caches and guesses can hope for: the shipped model's routing on its validation text.

    python -m benchmarks.routing

One token at a time, mean over blocks: hits of each policy, and how many of a block's experts are
among the first K and the first 2K that are guessed, by its own router on earlier streams and by
what its tokens chose when they came last.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.timing import table
from moecc.runtime.offload.replay import replay
from moecc.runtime.offload.token_memory import TokenMemory
from moecc.runtime.offload.trace import Request

REFERENCE = Path(__file__).parent / "reference"
WINDOW = 512
"""Tokens of context."""
SLOTS = (6, 8, 12, 16)


def main() -> None:
    """Print both tables."""
    tokens, chosen, guessed = observe(4096)
    experts = [[tuple(sorted(one)) for one in block.tolist()] for block in chosen]
    lines = [["hits", *(f"{slots} slots" for slots in SLOTS)]]
    lines += [
        [policy, *(f"{hit_rate(experts, slots, policy):.1%}" for slots in SLOTS)]
        for policy in ("lru", "lfu", "belady")
    ]
    print(table(lines))
    lines = [["guessed by", "first K", "first 2K"]]
    for distance, found in sorted(guessed.items()):
        means = [sum(shares) / len(shares) for shares in zip(*found, strict=True)]
        lines.append([f"router, {distance} blocks before", *(f"{one:.1%}" for one in means)])
    lines.append(["tokens, first block", f"{recall(tokens, chosen[0]):.1%}", ""])
    print(f"\n{table(lines)}")


def observe(
    count: int,
) -> tuple[list[int], list[torch.Tensor], dict[int, list[tuple[float, float]]]]:
    """Run so many tokens; give them, each block's choice [T, K], and shares by distance."""
    model: Any = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    layers, active = model.model.layers, model.config.num_experts_per_tok
    streams: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:
            streams[number] = inputs[0][0]

        return hook

    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(keep(number))
        for number, layer in enumerate(layers)
    ]
    tokenizer: Any = AutoTokenizer.from_pretrained(REFERENCE, model_max_length=1 << 30)
    files = sorted((REFERENCE / "validation").glob("*.txt"))
    tokens: list[int] = tokenizer("".join(file.read_text()[:6000] for file in files)).input_ids[
        :count
    ]
    seen: dict[int, list[torch.Tensor]] = defaultdict(list)
    with torch.no_grad():
        for start in range(0, len(tokens), WINDOW):
            model(torch.tensor([tokens[start : start + WINDOW]]))
            for number in range(len(layers)):
                seen[number].append(streams[number])
        for hook in hooks:
            hook.remove()
        whole = [torch.cat(seen[number]) for number in range(len(layers))]

        def ranked(target: int, stream: torch.Tensor) -> torch.Tensor:
            layer = layers[target]
            scores = layer.post_attention_layernorm(stream) @ layer.mlp.gate.weight.T
            return scores.topk(2 * active).indices

        chosen = [ranked(n, whole[n])[:, :active] for n in range(len(layers))]
        guessed: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for target in range(1, len(layers)):
            for distance in range(1, min(3, target) + 1):
                guess = ranked(target, whole[target - distance])
                first, all_of_it = (
                    share(chosen[target], guess[:, :width]) for width in (active, 2 * active)
                )
                guessed[distance].append((first, all_of_it))
    return tokens, chosen, guessed


def share(chosen: torch.Tensor, guess: torch.Tensor) -> float:
    """Give the share of what was chosen [T, K] that was guessed [T, N]."""
    return (chosen[:, :, None] == guess[:, None, :]).any(2).float().mean().item()


def hit_rate(experts: Sequence[Sequence[tuple[int, ...]]], slots: int, policy: str) -> float:
    """Replay each block's requests, and give the mean of the hit rates."""
    rates = [
        replay(
            [Request(block=0, tokens=1, experts=one, hits=0) for one in block], slots, policy
        ).hit_rate
        for block in experts
    ]
    return sum(rates) / len(rates)


def recall(tokens: Sequence[int], chosen: torch.Tensor) -> float:
    """Give the share of a block's choices [T, K] that its tokens made when they came last."""
    memory, found = TokenMemory(), 0
    for token, one in zip(tokens, chosen, strict=True):
        found += len(set(memory.recall([token])) & set(cast(list[int], one.tolist())))
        memory.learn(one[None])
    return found / chosen.numel()


if __name__ == "__main__":
    main()
