"""Measure how well a causal language model predicts text.

    python -m benchmarks.perplexity benchmarks/reference                   # no moecc, eager
    python -m benchmarks.perplexity benchmarks/reference --quantize int4   # moecc, 4-bit experts
    python -m benchmarks.perplexity Qwen/Qwen3-30B-A3B --text notes.txt

Without `--text`, each `MODEL/validation/KIND.txt` is one kind of text and gets one line.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

WINDOW = 512  # tokens a model sees at once
ROWS = 8  # windows per forward pass


@torch.no_grad()
def total_loss(model: torch.nn.Module, ids: torch.Tensor, window: int = WINDOW) -> float:
    """Sum the loss of `ids` [tokens] in nats, read in windows that do not overlap.

    The first token of each window has nothing before it and is given, not predicted.
    """
    whole = len(ids) // window * window
    batches = list(ids[:whole].view(-1, window).split(ROWS)) if whole else []
    if len(ids) - whole > 1:
        batches.append(ids[whole:].unsqueeze(0))
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total


def predicted(tokens: int, window: int = WINDOW) -> int:
    """Count the tokens that `total_loss` predicts out of `tokens`."""
    return tokens - math.ceil(tokens / window)


def find_texts(model: str) -> list[Path]:
    """List the validation texts beside the checkpoint `model`, one file for each kind."""
    folder = Path(model) / "validation"
    texts = sorted(folder.glob("*.txt"))
    if not texts:
        raise SystemExit(f"no text to measure: '{folder}' holds no '*.txt'; name one with '--text'")
    return texts


def print_losses(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Path]
) -> float:
    """Print one line for each text and one for all; return the overall loss in nats per token."""
    print(f"{'kind':<10} {'tokens':>8} {'nats/token':>11} {'perplexity':>11} {'bits/byte':>10}")
    rows = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        count = predicted(len(ids))
        if not count:
            raise SystemExit(f"no text to measure: '{path}' has fewer than two tokens")
        rows.append((path.stem, count, total_loss(model, ids), len(text.encode())))
    if len(rows) > 1:
        rows.append(("overall", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    for kind, count, loss, size in rows:
        mean, bits = loss / count, loss / math.log(2) / size
        print(f"{kind:<10} {count:>8} {mean:>11.4f} {math.exp(mean):>11.2f} {bits:>10.3f}")
    return rows[-1][2] / rows[-1][1]


def main() -> None:
    """Read the command line, load the model and print its losses."""
    parser = argparse.ArgumentParser(description="Measure a model's loss on text.")
    parser.add_argument("model", help="a checkpoint folder or a hub name")
    parser.add_argument("--text", type=Path, help="text to measure [MODEL/validation/*.txt]")
    parser.add_argument("--dtype", default="float32", help="type to compute in [float32]")
    parser.add_argument("--quantize", help="scheme of moecc's experts [no moecc]")
    args = parser.parse_args()
    texts = [args.text] if args.text else find_texts(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    if args.quantize:  # the model's own code then runs with moecc's kernels
        torch.compile(model.eval(), backend="moecc", options={"quantize": args.quantize})
    print_losses(model.eval(), tokenizer, texts)


if __name__ == "__main__":
    main()
