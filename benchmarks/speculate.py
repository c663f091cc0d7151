"""Time decoding with drafts beside decoding without, at the same memory.

    python -m benchmarks.speculate --memory 50%,75% --link 400,1600 --json FILE --plot FOLDER
    python -m benchmarks.speculate --corrupt 0,25,50,75,100

The model is that of `benchmarks.offload`: the shipped one with its experts made larger. Its store
lies in memory (`--store`, a folder of a tmpfs), behind a link that is held to so many megabytes a
second that the ratio of compute to transfer can be that of a GPU behind PCIe. Every contender runs
the same compiled model, the same kernels and the same tokens in the same memory. Drafts compute
with the cached experts, or with `--draft int3` on low-bit copies, which are taken from the slots;
those of auto come and go. Auto is timed after it tried drafts, which time has to pay for otherwise.

    lru, lfu         on demand, all memory for slots
    lfu + prefetch   the next layer's experts predicted with its router
    k=1, k=2, ...    drafts of so many tokens
    auto             as many as the governor finds to pay, none among its choices

Auto is compared with the best depth, `lfu + prefetch` being k=0. With `--corrupt`, so many per cent
of the drafted tokens are replaced by random ones: drafts that are wrong have to cost little. What
is waited is waited for experts while verifying; the rest is everything beside drafting and waiting.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer

import moecc
from benchmarks.offload import REFERENCE
from benchmarks.offload_contenders import Contender, new_contender
from benchmarks.speculate_table import Row, judge, print_cell
from benchmarks.timing import machine, stamp
from benchmarks.widened import widen
from moecc.generate import Difference, Timing, find_difference, generate
from moecc.lenders import banks_of, bound_to
from moecc.runtime.depth import Depth
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.stand_in import Lender
from moecc.runtime.rent import Rent
from moecc.runtime.schemes.scheme import SCHEMES
from moecc.runtime.twins import Twins
from moecc.runtime.watch import watching
from moecc.speculation import speculate as speculation
from moecc.speculation.accept import Proposal
from moecc.speculation.cached import CACHED
from moecc.speculation.copies import Twin, add_copies
from moecc.speculation.drafts import SelfDraft
from moecc.speculation.known import Speculation

TEXTS = {
    "scripture": "In the beginning God created the heaven and the earth. And the earth was without",
    "novel": '"My dear Emma," said Mr. Knightley, "you are a very extraordinary',
    "code": "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path",
}
WARM_UPS = 2
"""Rounds before those that are timed: auto may try copies, and give them back."""


@dataclass(slots=True, kw_only=True)
class Runner:
    """One contender: its banks, and its drafts if it has any."""

    banks: Contender
    k: int | str | None = None
    about: Speculation | None = None
    timings: list[Timing] = field(default_factory=list[Timing])
    read: int = 0
    drafted: float = 0.0
    waited: float = 0.0
    """Seconds, as that."""

    def round(self, model: Any, ids: torch.Tensor, new_tokens: int, counted: bool) -> None:
        """Generate once."""
        before = self.banks.link.bytes, *self._seconds()

        def note(tokens: int, _: float) -> None:
            if tokens == 1 and counted:  # what the prompt waited for is not counted
                self.waited -= self._seconds()[1] - before[2]

        with (
            bound_to(model, self._lender),
            mock.patch.object(speculation, "known", self._known),
        ):
            make = None if self.k is None else partial(moecc.speculate, self.k)
            timing = generate(model, ids, new_tokens, note, make)
        if counted:
            self.timings.append(timing)
            self.read += self.banks.link.bytes - before[0]
            drafted, waited = self._seconds()
            self.drafted += drafted - before[1]
            self.waited += waited - before[2]

    def _seconds(self) -> tuple[float, float]:
        counts = (bank.pool.trace.counts for bank in self.banks.banks)
        drafted = 0.0 if self.about is None else self.about.draft_seconds
        return drafted, sum(one.wait_seconds for one in counts)

    def _lender(self, bank: Bank) -> Lender:
        if self.about is None:
            return self.banks.lender(bank)
        return self.banks.banks[bank.number]  # itself: its slots may go to copies

    def _known(self, *_: Any) -> Speculation:
        assert self.about is not None
        return self.about


def main(given: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", default="50%,75%", help="parts of the experts, in per cent")
    parser.add_argument("--link", default="400,1600", help="megabytes a second")
    parser.add_argument("--draft", default=CACHED, help=f"{CACHED}, or of {[*SCHEMES]}")
    parser.add_argument("--depths", default="1,2,4,8")
    parser.add_argument("--text", default="scripture,novel,code", help=f"of {[*TEXTS]}")
    parser.add_argument("--corrupt", default="0", help="per cent of drafted tokens made random")
    parser.add_argument("--widen", type=int, default=64, help="times the experts' size")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner", default="inductor", help="compiles what is not MoE, or none")
    parser.add_argument("--store", type=Path, default=Path("/dev/shm"), help="a folder in memory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory(dir=arguments.store) as folder:
        rows = measure(widen(REFERENCE, Path(folder), arguments.widen), arguments)
    results = [asdict(row) for row in rows]
    if arguments.json:
        about = {name: getattr(arguments, name) for name in ("widen", "draft", "new_tokens")}
        record = {**stamp(), **about, "results": results}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    if arguments.plot:
        from benchmarks.speculate_plots import plot

        plot(results, arguments.plot)


def measure(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Time every contender in every cell, and print a table for each."""
    model: Any = moecc.load(folder, expert_memory="100%")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if arguments.inner != "none":
        options = {"inner": arguments.inner}
        model.forward = torch.compile(model.forward, backend="moecc", dynamic=True, options=options)
    copies, copied = Twins(), 0
    print(machine())
    rows: list[Row] = []
    for text in arguments.text.split(","):
        ids = tokenizer(TEXTS[text], return_tensors="pt").input_ids
        with watching() as uses:
            plain = generate(model, ids, arguments.new_tokens)
        if arguments.draft != CACHED and not copies.lenders:
            copied = _copy(copies, uses, arguments.draft)
        for memory in arguments.memory.split(","):
            for link in map(float, arguments.link.split(",")):
                for corrupt in map(float, arguments.corrupt.split(",")):
                    cell = {"memory": memory, "link": link, "text": text, "corrupt": corrupt}
                    runners = _runners(model, copies, copied, memory, link, arguments)
                    with corrupted(corrupt / 100, model.config.vocab_size):
                        for number in range(WARM_UPS + arguments.rounds):
                            for one in runners.values():
                                counted = number >= WARM_UPS
                                one.round(model, ids, arguments.new_tokens, counted)
                    found = [
                        _row(name, one, plain, cell, partial(find_difference, model, ids, plain))
                        for name, one in runners.items()
                    ]
                    print_cell(found)
                    rows += found
    judge(rows)
    return rows


def _copy(copies: Twins, uses: Any, draft: str) -> int:
    """Make the copies once; the model's own banks keep their slots, as contenders have others."""
    with (
        mock.patch("moecc.runtime.offload.pool.Pool.shrink"),
        mock.patch("moecc.speculation.copies._check_room"),
    ):
        return add_copies(copies, uses, SCHEMES[draft])


def _runners(
    model: Any, copies: Twins, copied: int, memory: str, link: float, arguments: Any
) -> dict[str, Runner]:
    own = banks_of(model)
    stores = [bank.store for bank in own]
    slots = int(float(memory.rstrip("%")) / 100 * stores[0].experts)
    left = slots - -(-copied // (len(stores) * stores[0].layout.size))
    runners = {
        name: Runner(banks=new_contender(name, stores, slots))
        for name in ("lru", "lfu", "lfu + prefetch")
    }
    depths: list[int | str] = [*map(int, arguments.depths.split(",")), "auto"]
    for depth in depths:
        if depth == "auto" and copied:
            rent = Rent(price=1.0, credit=2.0)  # enough for a try, at once
            about = Speculation(source=arguments.draft, depth=Depth(credit=1.0), rent=rent)
            banks = new_contender("lfu + prefetch", stores, slots)
            runners["auto"] = Runner(banks=banks, k=depth, about=about)
            continue
        banks = new_contender("lfu + prefetch", stores, left)
        lenders: dict[int, Lender] = {
            place: replace(twin, bank=banks.banks[twin.bank.number])
            for place, twin in copies.lenders.items()
            if isinstance(twin, Twin) and twin.bank is not None
        }
        about = Speculation(
            source=arguments.draft, depth=Depth(credit=1.0), twins=Twins(lenders=lenders)
        )
        name = depth if isinstance(depth, str) else f"k={depth}"
        runners[name] = Runner(banks=banks, k=depth, about=about)
    for one in runners.values():
        one.banks.link.limit = link * 1e6
    return runners


@contextmanager
def corrupted(share: float, vocabulary: int) -> Generator[None]:
    """Replace a share of all drafted tokens by random ones inside."""
    propose = SelfDraft.propose

    def wrong(self: SelfDraft, ids: torch.Tensor, depth: int) -> Proposal:
        right = propose(self, ids, depth).tokens
        random = torch.randint(vocabulary, right.shape)
        return Proposal(tokens=torch.where(torch.rand(right.shape) < share, random, right))

    with mock.patch.object(SelfDraft, "propose", wrong if share else propose):
        yield


def _row(
    name: str,
    runner: Runner,
    plain: Timing,
    cell: dict[str, Any],
    difference: Callable[[Timing], Difference],
) -> Row:
    different = [one for one in runner.timings if one.tokens != plain.tokens]
    rates = [one.decode_rate for one in runner.timings]
    tokens = sum(len(one.tokens) for one in runner.timings)
    parts = {"drafting": runner.drafted / tokens, "waiting": runner.waited / tokens}
    parts["rest"] = sum(one.decode_seconds for one in runner.timings) / tokens - sum(parts.values())
    about = runner.about
    drafted = about is not None and about.drafted > 0
    return Row(
        contender=name,
        **cell,
        tokens_per_second=statistics.median(rates),
        spread=(min(rates), max(rates)),
        slots=runner.banks.banks[0].pool.slots,
        accepted=about.accepted / about.drafted if about and drafted else None,
        tokens_per_pass=about.tokens / about.cycles if about else None,
        megabytes_per_token=runner.read / tokens / 1e6,
        milliseconds={name: 1e3 * seconds for name, seconds in parts.items()},
        same_tokens=not different,
        tied=all(difference(one).is_tie for one in different),
    )


if __name__ == "__main__":
    main()
