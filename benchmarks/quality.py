"""Measure what low-bit experts cost: bits per weight against KL, perplexity and agreement.

    python -m benchmarks.quality                                   # the shipped model
    python -m benchmarks.quality benchmarks/reference FOLDER --json FILE --plot FILE

FOLDER is a checkpoint of `benchmarks.train_reference`. The expert weights of a model are replaced
by what their codes stand for, and the rest stays as it is, so that contenders differ in nothing but
the rounding of weights; all are calibration-free but the `calibrated` rows, which weigh errors by
inputs seen on the last windows of each text, and the `compensated` ones, whose codes make up for
each other's errors there; these windows are not measured. `as run` rows are moecc's
own kernels, which round inputs to 8 bits too. `4.5bpw` shares out the bytes of the uniform scheme
with as many bits, as `moecc.budgets` does. A row's last group may be short, and counts as one: the
shipped model has rows of 48. Errors are standard errors over windows of text; differences are those
to moecc's int4-g32, window by window. Results are written after each model.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness.plots import require
from benchmarks.perplexity import ROWS, WINDOW, find_texts
from benchmarks.rounding import Contender, contenders, missing, scheme_bits
from benchmarks.timing import machine, stamp, table
from moecc.budgets import reach_of
from moecc.calibrate import calibrate
from moecc.checkpoint.calibration import Calibration
from moecc.runtime.schemes.budget import CANDIDATES, allocate, relative_error
from moecc.runtime.schemes.packing import dequantize, quantize
from moecc.runtime.schemes.scheme import SCHEMES, Scheme
from moecc.sensitivity import measure_sensitivity

PROJECTIONS = ("gate_up_proj", "down_proj")
AS_RUN = ("int8", "int4", "int4-g32-zeros", "mxfp4", "fp8")
COMPENSATED = ("int4-g32", "int4-g64", "int4-g32-zeros", "int3-g64")
CALIBRATED = ("int4-g32", "int4-g64", "int4-g128", "int4-g32-zeros", "mxfp4", "int3-g64")
BUDGETS = {"4.25bpw": "int4-g64", "4.5bpw": "int4-g32", "5bpw": "int4-g32-zeros"}
"""Whose bytes are shared out."""
BESIDE = "int4-g32"
"""Everything is compared with it."""
KEPT = 4
"""Windows of each text that calibration sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one contender costs on one model."""

    model: str
    name: str
    family: str
    bits: float
    kl: float
    """Mean over tokens of KL(unquantized, quantized), in nats."""
    kl_error: float
    """Its standard error."""
    kl_beside: float
    """Less the KL of int4-g32."""
    kl_beside_error: float
    perplexity: float
    change: float
    """Of perplexity, relative to the unquantized model."""
    change_error: float
    change_beside: float
    """Relative to int4-g32."""
    change_beside_error: float
    agreement: float
    """Share of tokens whose most likely successor stays the same."""

    def __str__(self) -> str:
        """Give one line."""
        return (
            f"{self.family:>17} {self.name:<16} {self.bits:5.3f} bits  KL {self.kl:.5f} "
            f"±{self.kl_error:.5f} ({self.kl_beside:+.5f} ±{self.kl_beside_error:.5f})  perplexity "
            f"{self.change:+.2%} ±{self.change_error:.2%} ({self.change_beside:+.2%} "
            f"±{self.change_beside_error:.2%})  same {self.agreement:.2%}"
        )


class Subject:
    """A model, its text, and what it says unquantized."""

    def __init__(self, folder: str, tokens: int | None) -> None:
        """Load a checkpoint and its validation texts; `tokens` limits those of each kind."""
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.name: str = self._model.config.model_type
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [path.read_text(encoding="utf-8") for path in find_texts(folder)]
        ids = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts]
        windows = [one[: len(one) // WINDOW * WINDOW].view(-1, WINDOW) for one in ids]
        count = tokens and tokens // WINDOW
        self._batches = torch.cat([one[:-KEPT][:count] for one in windows]).split(ROWS)
        self._seen = [row for one in windows for row in one[-KEPT:]]
        self._folder = Path(folder)
        self.tokens = sum(batch[:, 1:].numel() for batch in self._batches)
        self._own = {
            f"{path}.{name}": getattr(module, name).detach().clone()
            for path, module in self._model.named_modules()
            for name in PROJECTIONS
            if hasattr(module, name)
        }
        self.adopt()
        self._said = [self._log_likelihoods(batch) for batch in self._batches]
        self._beside: tuple[torch.Tensor, torch.Tensor] | None = None

    def bits(self, of_rows: Callable[[int], float]) -> float:
        """Average bits per weight, given those of rows of so many columns."""
        sizes = {path: one.numel() for path, one in self._own.items()}
        total = sum(of_rows(one.shape[-1]) * sizes[path] for path, one in self._own.items())
        return total / sum(sizes.values())

    def sensitivity(self) -> dict[str, float]:
        """Say what errors of each block weigh, by its path."""
        paths = dict.fromkeys(path.rpartition(".")[0] for path in self._own)
        return measure_sensitivity(self._model, {p: self._model.get_submodule(p) for p in paths})

    def calibrate(self) -> Calibration:
        """Run the checkpoint on the windows that are not measured."""
        return calibrate(self._folder, self._seen, compensate=True)

    def adopt(self, scheme: str | None = None) -> None:
        """Let moecc's kernels run the experts, in a scheme or as their weights are."""
        torch.compile(self._model, backend="moecc", options={"quantize": scheme})

    def matrices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the expert matrices [E, N, K] of each block and projection."""
        yield from self._own.items()

    def write(self, path: str, weights: torch.Tensor) -> None:
        """Replace expert matrices by others."""
        with torch.no_grad():
            own = self._model.get_parameter(path)
            own.copy_(weights.reshape(own.shape))

    def restore(self) -> None:
        """Write the model's own weights back."""
        for path, weights in self._own.items():
            self.write(path, weights)

    def measure(self, name: str, family: str, bits: float) -> Measured:
        """Compare what the model says now with what it said unquantized, and with `BESIDE`.

        The first that is measured is `BESIDE`.
        """
        kls, losses = list[torch.Tensor](), list[torch.Tensor]()  # of each window
        total, agreed = 0.0, 0.0
        for batch, own in zip(self._batches, self._said, strict=True):
            now, targets = self._log_likelihoods(batch), batch[:, 1:].flatten()
            lost = F.nll_loss(now, targets, reduction="none")
            before = F.nll_loss(own, targets, reduction="none")
            kl = F.kl_div(now, own, log_target=True, reduction="none").sum(-1)
            kls.append(kl.double().view(len(batch), -1).mean(1))
            losses.append((lost - before).double().view(len(batch), -1).mean(1))
            total += float(before.sum())
            agreed += float((now.argmax(-1) == own.argmax(-1)).sum())
        kl, loss = torch.cat(kls), torch.cat(losses)
        self._beside = self._beside or (kl, loss)
        changed, beside = _mean(loss), _mean(loss - self._beside[1])
        return Measured(
            model=self.name, name=name, family=family, bits=round(bits, 4),
            kl=_mean(kl), kl_error=_error(kl),
            kl_beside=_mean(kl - self._beside[0]), kl_beside_error=_error(kl - self._beside[0]),
            perplexity=math.exp(total / self.tokens + changed),
            change=math.expm1(changed), change_error=_error(loss),
            change_beside=math.expm1(beside), change_beside_error=_error(loss - self._beside[1]),
            agreement=agreed / self.tokens,
        )  # fmt: skip

    @torch.no_grad()
    def _log_likelihoods(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self._model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).flatten(0, 1)


def _mean(windows: torch.Tensor) -> float:
    return float(windows.mean())


def _error(windows: torch.Tensor) -> float:
    """Give the standard error of the mean over windows."""
    return float(windows.std() / math.sqrt(len(windows)))


def measure_all(subject: Subject, names: Sequence[str]) -> Iterator[Measured]:
    """Measure `BESIDE` and every contender, or those of some names."""
    every = sorted(contenders(), key=lambda one: (one.family, one.name) != ("moecc", BESIDE))
    for contender in every:
        if not names or contender.name in {*names, BESIDE}:
            _round(subject, contender)
            bits = subject.bits(contender.bits)
            yield subject.measure(contender.name, contender.family, bits)
    yield from _calibrated(subject, [one for one in CALIBRATED if not names or one in names])
    yield from _budgets(subject, [one for one in BUDGETS if not names or one in names])
    subject.restore()
    for name in (one for one in AS_RUN if not names or one in names):
        subject.adopt(name)
        yield subject.measure(name, "moecc, as run", _bits(subject, SCHEMES[name]))
    subject.adopt()


def _round(subject: Subject, contender: Contender) -> None:
    for path, weights in subject.matrices():
        # Groups lie along rows, so experts may be stacked, but blocks of rows end with an expert.
        if contender.name.startswith("fp8-b"):
            known = torch.stack([contender.rounded(one) for one in weights])
        else:
            known = contender.rounded(weights.flatten(0, 1))
        subject.write(path, known)


def _calibrated(subject: Subject, names: Sequence[str]) -> Iterator[Measured]:
    """Round each expert with the inputs that it was given, by column and compensated."""
    if not names:
        return
    calibration = subject.calibrate()
    print(calibration)
    kinds = [("moecc, calibrated", name) for name in names]
    kinds += [("moecc, compensated", name) for name in COMPENSATED if name in names]
    for family, scheme in ((family, SCHEMES[name]) for family, name in kinds):
        for path, weights in subject.matrices():
            block, _, name = path.rpartition(".")
            importance = calibration.blocks[block]
            if family == "moecc, calibrated":
                importance = replace(importance, products=None)
            inputs = [importance.of(expert) for expert in range(len(weights))]
            place = PROJECTIONS.index(name)
            known = [
                dequantize(quantize(one, scheme, seen and seen[place]), scheme)[:, : one.shape[1]]
                for one, seen in zip(weights, inputs, strict=True)
            ]
            subject.write(path, torch.stack(known))
        yield subject.measure(str(scheme), family, _bits(subject, scheme))


def _bits(subject: Subject, scheme: Scheme) -> float:
    return subject.bits(partial(scheme_bits, scheme))


def _budgets(subject: Subject, names: Sequence[str]) -> Iterator[Measured]:
    """Share bits among blocks and projections, with every expert's error."""
    if not names:
        return
    own = {path: weights.flatten(0, 1) for path, weights in subject.matrices()}
    weights = sum(flat.numel() for flat in own.values())
    reach = reach_of(own, subject.sensitivity())
    errors = [
        [relative_error([flat], one) * reach[path] for one in CANDIDATES]
        for path, flat in own.items()
    ]
    sizes = [[_bytes(flat, one) for one in CANDIDATES] for flat in own.values()]
    for name in names:
        budget = sum(_bytes(flat, SCHEMES[BUDGETS[name]]) for flat in own.values())
        chosen = [CANDIDATES[number] for number in allocate(errors, sizes, budget)]
        for (path, flat), scheme in zip(own.items(), chosen, strict=True):
            known = dequantize(quantize(flat, scheme), scheme)[:, : flat.shape[1]]
            subject.write(path, known)
        spent = sum(map(_bytes, own.values(), chosen))
        print(f"{name}: {', '.join(map(str, chosen))}")
        yield subject.measure(name, "moecc, mixed", 8 * spent / weights)


def _bytes(flat: torch.Tensor, scheme: Scheme) -> int:
    return round(flat.numel() * scheme_bits(scheme, flat.shape[1]) / 8)


def _write(rows: list[Measured], results: Path | None, picture: Path | None) -> None:
    if results:
        found = {**stamp(), "rows": [asdict(row) for row in rows]}
        results.write_text(json.dumps(found, indent=1) + "\n")
    if picture:
        plot(rows, picture)


def plot(rows: list[Measured], file: Path) -> None:
    """Draw bits against KL, one panel a model; raises `MissingExtra` without matplotlib."""
    pyplot = require()
    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(7 * len(models), 5), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        for family in dict.fromkeys(row.family for row in rows):
            points = sorted(
                (row.bits, row.kl) for row in rows if (row.model, row.family) == (model, family)
            )
            marker = "o" if family.startswith("moecc") else "x"
            panel.scatter(*zip(*points, strict=True), label=family, marker=marker, alpha=0.7)
        panel.set(title=model, xlabel="bits per weight", ylabel="mean KL, nats", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description="Measure what low-bit experts cost.")
    parser.add_argument("models", nargs="*", default=["benchmarks/reference"], help="folders")
    parser.add_argument("--tokens", type=int, help="of each kind of text [all]")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows [all]")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="picture of the frontier; needs matplotlib")
    args = parser.parse_args()
    print(machine())
    if missing():
        print(f"left out, not installed: {', '.join(missing())}")
    rows: list[Measured] = []
    for folder in args.models:
        subject = Subject(folder, args.tokens)
        print(f"{subject.name}: {subject.tokens} tokens", flush=True)
        for row in measure_all(subject, args.only):
            rows.append(row)
            print(row, flush=True)
        _write(rows, args.json, args.plot)
    for model in dict.fromkeys(row.model for row in rows):
        mine = sorted((row for row in rows if row.model == model), key=lambda row: row.bits)
        head = [[model, "bits", "KL", "perplexity", "same token"]]
        print(table(head + [
            [f"{row.family}: {row.name}", f"{row.bits:.3f}", f"{row.kl:.5f}", f"{row.change:+.2%}",
             f"{row.agreement:.2%}"] for row in mine
        ]))  # fmt: skip


if __name__ == "__main__":
    main()
