"""Slots on a device: the order of copies and kernels, and the bits of the resident call."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moecc.codegen import reference
from moecc.runtime.errors import InputError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.device import Cuda
from moecc.runtime.offload.device_link import DeviceLink, hold_in_memory
from moecc.runtime.offload.home import Home
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.store import Store
from tests.runtime.offload.dry_device import DryDevice
from tests.runtime.offload.stores import SIZE, write_store
from tests.runtime.offload.test_bank import EXPERTS, Block, foretell


def held(store: Store, device: Any) -> Store:
    link = Link()
    try:
        return hold_in_memory(store, link, device)
    finally:
        link.close()


def run(block: Block, bank: Bank, device: DryDevice, batch: list[torch.Tensor]) -> torch.Tensor:
    """Call a bank, and log which slots its kernel reads."""
    add = block.kernel.add
    assert add is not None

    def logged(
        onto: torch.Tensor, slots: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, *rest: Any
    ) -> None:
        named = ids[(ids >= 0) & (ids < EXPERTS)].unique()
        for slot in slots[named].tolist():
            if slot >= 0:
                device.log.append(("kernel", bank.pool.records[slot].data_ptr(), None))
        add(onto, slots, hidden, ids, *rest)

    return bank.run(logged, *batch, *block.biases)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scheme"), [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "int4")]
)
def test_late_copies_change_no_bit(
    pinned: bool, dtype: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    block = Block(tmp_path, "native", dtype, scheme=scheme)
    for slots in range(1, EXPERTS + 1):
        device = DryDevice(random.Random(slots))
        store = replace(held(block.store, device), pinned=pinned)
        policy = list(POLICIES.values())[slots % 3]
        bank = Bank(
            number=0, store=store, pool=Pool(store.layout, slots, policy, DeviceLink(device))
        )
        for tokens in (1, 3, 64, 0, 1, 3, 1):
            batch = block.batch(tokens)
            expected = block.kernel.run(*batch, *block.weights)  # pyright: ignore
            assert torch.equal(run(block, bank, device, batch), expected)
            foretell(bank)
        device.check_order()
        copies = [address for what, address, _ in device.log if what == "copy"]
        counts = bank.pool.trace.counts
        assert counts.misses <= len(copies) <= counts.misses + counts.predicted
        assert device.pinned == (1 if pinned else 1 + min(len(copies), 3))


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "int4"), (torch.float32, "fp8")],
)
def test_triton_kernels_read_slots_that_copies_fill_late(
    dtype: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    interpreter = pytest.importorskip("tests.codegen.triton_interpreter")
    block = Block(tmp_path, "triton", dtype, scheme=scheme)
    for slots in (2, EXPERTS):
        device = DryDevice(random.Random(slots))
        store = held(block.store, device)
        pool = Pool(store.layout, slots, POLICIES["lru"], DeviceLink(device))
        bank = Bank(number=0, store=store, pool=pool)
        for tokens in (1, 3, 1):
            batch = block.batch(tokens)
            with interpreter.interpreted():
                expected = block.kernel.run(*batch, *block.weights)  # pyright: ignore
                got = run(block, bank, device, batch)
            assert torch.equal(got, expected)
            foretell(bank)
        device.check_order()


@pytest.mark.parametrize(
    ("sooner", "scheme"), [(True, ""), (True, "int8"), (False, ""), (None, "")]
)
def test_a_miss_is_computed_at_home_when_that_is_sooner(
    sooner: bool | None, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(tmp_path, "native", torch.bfloat16, scheme=scheme)
    device = DryDevice()
    store = held(block.store, device)
    assert block.kernel.add is not None
    home = Home(add=block.kernel.add)
    if sooner is not None:
        monkeypatch.setattr(DeviceLink, "arrival", lambda *_: 1e9 if sooner else 0.0)
    pool = Pool(store.layout, 3, POLICIES["lru"], DeviceLink(device))
    bank = Bank(number=0, store=store, pool=pool, home=home)
    for tokens in (1, 1, 3, 64, 1, 3):
        batch = block.batch(tokens)
        expected = block.kernel.run(*batch, *block.weights)  # pyright: ignore
        assert torch.equal(run(block, bank, device, batch), expected)
    device.check_order()
    counts = pool.trace.counts
    assert counts.home >= 3, "each magnitude of tokens is tried once"
    if sooner is False:
        assert counts.home == 3


def test_an_arrival_counts_what_goes_before(waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, link, loads, _ = waiting
    assert link.arrival(loads[0]) is None, "nothing was measured"
    size = loads[0].store.layout.size
    monkeypatch.setattr(DeviceLink, "bandwidth", property(lambda _: float(size)))
    for load in loads:
        link.submit(load)
    assert [link.arrival(load) for load in loads] == [2, 2, 4, 4]  # two are queued, in any order
    link.promote(loads[3])
    assert link.arrival(loads[3]) == 3


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[DryDevice, DeviceLink, list[Load], list[torch.Tensor]]:
    device = DryDevice(random.Random(0))
    device.is_done = lambda event: event <= device.done  # type: ignore[method-assign]
    store, data = write_store(tmp_path, experts=4)
    store = held(store, device)
    link = DeviceLink(device)
    _, records = link.new_slots(4, store.layout)
    return device, link, [Load(store, n, records[n], priority=1) for n in range(4)], data


def test_few_copies_are_queued_and_a_demand_goes_before_the_rest(waiting: Any) -> None:
    device, link, loads, data = waiting
    for load in loads:
        link.submit(load)
    assert len(device.late) == 2
    link.wait(loads[3])
    assert torch.equal(loads[3].record[:SIZE], data[3])
    assert not link.arrived(loads[2]), "its copy is not even queued"
    link.wait(loads[2])
    assert torch.equal(loads[2].record[:SIZE], data[2])
    assert link.arrived(loads[0])
    assert link.bytes == 4 * loads[0].store.layout.size
    assert link.bandwidth is not None
    assert link.busy() == 0.0


def test_a_pinned_record_is_not_written_to_before_its_copy_ran(tmp_path: Path) -> None:
    device = DryDevice()
    device.is_done = lambda event: event <= device.done  # type: ignore[method-assign]
    device.hold = lambda event: None  # type: ignore[method-assign]
    store, data = write_store(tmp_path, experts=6)
    store = replace(held(store, device), pinned=False)
    link = DeviceLink(device)
    _, records = link.new_slots(6, store.layout)
    loads = [Load(store, n, records[n]) for n in range(6)]
    for load in loads:
        link.submit(load)
        link.wait(load)
    link.close()
    for load, one in zip(loads, data, strict=True):
        assert torch.equal(load.record[:SIZE], one)
    assert device.pinned == 1 + 3


def test_what_is_cancelled_is_not_copied(waiting: Any) -> None:
    device, link, loads, _ = waiting
    for load in loads:
        link.submit(load)
    link.cancel(loads[1:])
    link.close()
    assert sum(what == "copy" for what, *_ in device.log) == 2
    assert all(load.done for load in loads)
    assert not device.late


def test_slots_on_a_device_do_not_shrink(waiting: Any) -> None:
    _, link, loads, _ = waiting
    pool = Pool(loads[0].store.layout, 2, POLICIES["lru"], link)
    with pytest.raises(InputError, match="slots on a device"):
        pool.shrink(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_device_gives_the_bits_of_the_resident_call(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    block, cuda = Block(tmp_path, "torch", dtype), torch.device("cuda")
    kernel = reference.emit(replace(block.kernel.spec, device="cuda"))
    weights = [None if one is None else one.to(cuda) for one in block.weights]
    device = Cuda(cuda)
    store = held(block.store, device)
    assert kernel.add is not None
    for slots in (1, 2, 4, EXPERTS):
        pool = Pool(store.layout, slots, POLICIES["lru"], DeviceLink(device))
        bank = Bank(number=0, store=store, pool=pool)
        for tokens in (1, 3, 64, 1):
            batch = [one.to(cuda) for one in block.batch(tokens)]
            got = bank.run(kernel.add, *batch, *weights[2:4])
            assert torch.equal(got, kernel.run(*batch, *weights))  # pyright: ignore
            foretell(bank)
