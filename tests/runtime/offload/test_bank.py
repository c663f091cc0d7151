"""Experts from slots: the bits of a call with all of them in memory, at every number of slots."""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moecc.codegen import low_bit, reference
from moecc.codegen.gpus import GPUS
from moecc.codegen.native.emit import emit
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.codegen.triton_costs import plans
from moecc.runtime.errors import StoreError
from moecc.runtime.offload import native_readers
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.record import Layout
from moecc.runtime.offload.store import Files, Read, Store
from moecc.runtime.schemes.scheme import SCHEMES, Schemes
from tests.codegen.native_cases import make_batch, make_experts, make_spec
from tests.runtime.offload.stores import KINDS, Gate, fail_reads, in_a_thread, in_child

EXPERTS = 6
CASES = [
    ("native", torch.float32), ("native", torch.bfloat16), ("native", torch.float16),
    ("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64),
]  # fmt: skip


def emit_for_a_gpu(spec: KernelSpec) -> Kernel:
    """Emit a Triton kernel that needs no GPU to choose its plan, and can be interpreted."""
    triton_emitter = pytest.importorskip("moecc.codegen.triton_emitter")
    spec = replace(spec, device="cuda")
    return triton_emitter.emit(spec, plans(spec, GPUS["sm_90"], 2)[0])


EMITTERS = {"native": emit, "torch": reference.emit, "triton": emit_for_a_gpu}


class Block:
    """One block's experts in memory and on disk."""

    def __init__(
        self, folder: Path, emitter: str, dtype: torch.dtype, number: int = 0, scheme: str = ""
    ) -> None:
        spec = make_spec("gpt-oss", dtype, EXPERTS)
        self.weights = make_experts(spec)
        self.schemes = Schemes(first=SCHEMES[scheme], second=SCHEMES[scheme]) if scheme else None
        if self.schemes is not None:
            self.weights = [*low_bit.packed_tensors(spec, self.schemes, self.weights)]
            spec = low_bit.packed_kernel(spec, self.schemes, "torch").spec
        self.kernel: Kernel = EMITTERS[emitter](spec)
        first, second, *self.biases, up, _ = self.weights
        held = {"gate_up": first, "down": second, "up": up}
        matrices = {name: one for name, one in held.items() if one is not None}
        layout = Layout.of({name: (one.shape[1:], one.dtype) for name, one in matrices.items()})
        file = folder / f"{number}.bin"
        reads: list[list[Read]] = [[] for _ in range(EXPERTS)]
        with file.open("wb") as opened:
            for expert, part in itertools.product(range(EXPERTS), layout.parts):
                at = opened.tell()
                reads[expert].append(Read(file=file, offset=at, length=part.size, into=part.offset))
                one = matrices[part.name][expert].contiguous()
                opened.write(one.view(torch.uint8).numpy().tobytes())
        self.store = Store(name=f"layers.{number}", layout=layout, reads=tuple(map(tuple, reads)))
        self.number = number

    def bank(self, pool: Pool) -> Bank:
        return Bank(number=self.number, store=self.store, pool=pool, schemes=self.schemes)

    def batch(self, tokens: int) -> list[torch.Tensor]:
        """Make tokens; some name an expert twice, or none that there is."""
        hidden, ids, scores = make_batch(self.kernel.spec, tokens, 2)
        if tokens > 2:
            ids[1] = ids[1, 0]
            ids[2] = torch.tensor([-1, EXPERTS])
        return [hidden, ids, scores]

    def check(self, bank: Bank, batch: list[torch.Tensor]) -> None:
        """Compare bits with the resident kernel."""
        assert self.kernel.add is not None
        got = bank.run(self.kernel.add, *batch, *self.biases)
        assert torch.equal(got, self.kernel.run(*batch, *self.weights))  # pyright: ignore


def foretell(bank: Bank) -> None:
    """Let two experts in that nobody asked for."""
    guessed = [(bank.number, expert) for expert in random.sample(range(EXPERTS), 2)]
    with bank.pool.lock:
        bank.pool.predict(bank.store, guessed, 1, 2)


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link(new=KINDS["native"])
    yield made
    made.close()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count loads by expert; each read takes a time of its own."""
    count: Counter[int] = Counter()
    original, submit, times = Files.read, Link.submit, random.Random(0)

    def counted(self: Link, load: Load) -> None:
        count[load.expert] += 1
        submit(self, load)

    def read(self: Files, *args: Any) -> None:
        if times.random() < 0.3:
            time.sleep(times.random() * 0.002)  # not to wait for anything: to come late
        original(self, *args)

    monkeypatch.setattr(Link, "submit", counted)
    monkeypatch.setattr(Files, "read", read)
    monkeypatch.setattr(native_readers, "BY_HAND", True)
    return count


@pytest.mark.parametrize(("emitter", "dtype"), CASES, ids=str)
def test_every_number_of_slots_gives_the_bits_of_all(
    emitter: str, dtype: torch.dtype, tmp_path: Path, link: Link, loads: Counter[int]
) -> None:
    block = Block(tmp_path, emitter, dtype)
    for slots in range(1, EXPERTS + 1):
        policy = list(POLICIES.values())[slots % 3]
        bank = block.bank(Pool(block.store.layout, slots, policy, link))
        assert bank.pool.records.numel() == slots * block.store.layout.size
        for tokens in (1, 3, 64, 0, 1, 3):
            loads.clear()
            block.check(bank, block.batch(tokens))
            assert set(loads.values()) <= {1}  # each expert at most once a call
            foretell(bank)
        assert not bank.pool.cache._pins
        counts = bank.pool.trace.counts
        assert (counts.requests, counts.experts >= counts.hits) == (6, True)


def test_what_is_there_computes_while_the_rest_arrives(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(tmp_path, "native", torch.float32)
    bank = block.bank(Pool(block.store.layout, 3, POLICIES["lru"], link))
    hidden, _, scores = block.batch(1)
    bank.run(block.kernel.add, hidden, torch.tensor([[0, 1]]), scores, *block.biases)  # pyright: ignore
    gate = Gate(monkeypatch)
    added: list[list[int]] = []

    def add(onto: torch.Tensor, slots: torch.Tensor, *inputs: Any) -> None:
        added.append([expert for expert in (0, 4) if slots[expert] >= 0])
        if not added[1:]:
            gate.open()  # what is missing has to wait until something was computed
        assert block.kernel.add is not None
        block.kernel.add(onto, slots, *inputs)

    ids = torch.tensor([[4, 0]])
    got = bank.run(add, hidden, ids, scores, *block.biases)
    assert added == [[0], [4]]
    assert torch.equal(got, block.kernel.run(hidden, ids, scores, *block.weights))  # pyright: ignore


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_share_a_pool(policy: str, tmp_path: Path, link: Link, loads: Counter[int]) -> None:
    blocks = [Block(tmp_path, "native", torch.bfloat16, number) for number in range(3)]
    pool = Pool(blocks[0].store.layout, 5, POLICIES[policy], link)
    banks = [block.bank(pool) for block in blocks]
    for turn in range(30):
        block, bank = blocks[turn % 3], banks[turn % 3]
        foretell(banks[(turn + 1) % 3])
        block.check(bank, block.batch(random.choice((1, 2, 3, 20))))
        if turn == 20:
            pool.shrink(3)


def test_two_threads_may_call_one_bank(tmp_path: Path, link: Link, loads: Counter[int]) -> None:
    block = Block(tmp_path, "native", torch.float32)
    bank = block.bank(Pool(block.store.layout, 3, POLICIES["lru"], link))

    def call() -> None:
        for tokens in (1, 3, 20) * 5:
            block.check(bank, block.batch(tokens))

    both = [in_a_thread(call), in_a_thread(call)]
    for result in both:
        result()
    assert bank.pool.trace.counts.requests == 30


def test_a_call_that_fails_leaves_the_next_one_right(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(tmp_path, "native", torch.float32)
    bank = block.bank(Pool(block.store.layout, 3, POLICIES["lru"], link))
    batch = block.batch(20)
    with monkeypatch.context() as patch:
        fail_reads(patch, [OSError(5, "Input/output error")] * 100)
        with pytest.raises(StoreError, match=r"of 'layers.0' from .*Input/output error"):
            block.check(bank, batch)
        while not all(map(link.arrived, bank.pool._loads.values())):
            time.sleep(0.001)  # others of the call fail too, before reads work again
    assert not bank.pool.cache._pins
    block.check(bank, batch)


def test_a_forked_child_computes_too(tmp_path: Path, link: Link) -> None:
    block = Block(tmp_path, "native", torch.float32)
    bank = block.bank(Pool(block.store.layout, 3, POLICIES["lru"], link))
    batch = block.batch(64)
    block.check(bank, batch)

    def in_the_child() -> bool:
        signal.alarm(10)  # waiting for threads that a child does not have
        block.check(bank, batch)
        block.check(bank, batch[:1] + [one.flip(0) for one in batch[1:]])
        return True

    assert in_child(in_the_child) == 0
    block.check(bank, batch)
