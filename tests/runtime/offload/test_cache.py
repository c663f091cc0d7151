"""The table of experts and slots against a naive model that remembers everything."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moecc.runtime.errors import InputError
from moecc.runtime.offload.cache import Admission, Cache
from moecc.runtime.offload.policy import FADE, POLICIES, Key, Usage, belady, lfu, lookahead, lru

KEYS = st.tuples(st.integers(0, 2), st.integers(0, 4))
SETS = st.lists(KEYS, min_size=1, max_size=6, unique=True)


class Naive:
    """What is where, and every event there ever was."""

    def __init__(self, policy: str, slots: int) -> None:
        self.policy, self.slots, self.step = policy, slots, 0
        self.where: dict[Key, int] = {}
        self.pinned: list[Key] = []
        self.log: list[tuple[str, Key, int]] = []

    def latest(self, kinds: str, key: Key) -> int:
        return next((s for kind, k, s in self.log[::-1] if k == key and kind in kinds.split()), -1)

    def newest(self, kinds: str, key: Key) -> str:
        """Tell which of these events an expert had last."""
        return next(kind for kind, k, _ in self.log[::-1] if k == key and kind in kinds.split())

    def score(self, key: Key) -> tuple[float, ...]:
        """Lowest leaves."""
        last, due = self.latest("use foretold", key), self.latest("due", key)
        if self.policy == "lru":
            return (last,)
        uses, seen = 0.0, 0
        for step in dict.fromkeys(s for kind, k, s in self.log if kind == "use" and k[0] == key[0]):
            used = ("use", key, step) in self.log
            uses, seen = (uses * FADE**seen + 1.0, 1) if used else (uses, seen + 1)
        often = (due > self.step, uses * FADE ** max(0, seen - 1), last)
        if self.policy == "lfu":
            return often
        return (-(due - self.step) if due > self.step else float("-inf"), *often)

    def victims(self, spared: int | None = None) -> set[Key]:
        """Whoever may leave: all of the lowest score, but none predicted up to step `spared`."""
        free = [key for key in self.where if key not in self.pinned]
        if spared is not None:
            free = [key for key in free if not self.step < self.latest("due", key) <= spared]
        scores = {key: self.score(key) for key in free}
        return {key for key, score in scores.items() if score == min(scores.values())}

    def follow(self, one: Admission, spared: int | None = None) -> None:
        """Check that one expert was admitted as it must be, and remember it."""
        assert one.hit == (one.key in self.where)
        if one.hit:
            assert (one.slot, one.evicted) == (self.where[one.key], None)
            return
        if one.evicted is None:
            assert one.slot in set(range(self.slots)) - set(self.where.values())
        else:
            assert len(self.where) == self.slots  # nobody leaves while there is room
            assert one.evicted in self.victims(spared)
            assert one.slot == self.where.pop(one.evicted)
        self.where[one.key] = one.slot
        self.log.append(("came", one.key, self.step))


class Machine(RuleBasedStateMachine):
    """Random requests, releases, predictions, withdrawals, failures, shrinking and growing."""

    policy = "lru"
    held = Bundle("held")

    @initialize(slots=st.integers(1, 8))
    def start(self, slots: int) -> None:
        self.cache = Cache(slots, POLICIES[self.policy])
        self.naive = Naive(self.policy, slots)

    @rule(target=held, keys=SETS)
    def request(self, keys: list[Key]):
        naive = self.naive
        taken = {key for key in naive.where if key in naive.pinned or key in keys}
        if len(set(keys) - naive.where.keys()) > naive.slots - len(taken):
            with pytest.raises(InputError, match=f"{naive.slots} slots"):
                self.cache.request(keys)
            return multiple()
        naive.step += 1
        naive.pinned += keys
        admitted = self.cache.request(keys)
        assert [one.key for one in admitted] == keys
        for one in admitted:
            naive.follow(one)
        naive.log += [("use", key, naive.step) for key in keys]
        return keys

    @rule(keys=consumes(held))
    def release(self, keys: list[Key]) -> None:
        self.cache.release(keys)
        for key in keys:
            self.naive.pinned.remove(key)

    @rule(keys=SETS, ahead=st.integers(1, 4), most=st.integers(0, 4))
    def predict(self, keys: list[Key], ahead: int, most: int) -> None:
        naive, due = self.naive, self.naive.step + ahead
        naive.log += [("due", key, due) for key in keys]
        admitted = self.cache.predict(keys, due, most)
        absent = [key for key in keys if key not in naive.where]
        assert [one.key for one in admitted] == absent[: len(admitted)]
        assert len(admitted) <= most
        for one in admitted:
            naive.follow(one, spared=due)
            naive.log.append(("foretold", one.key, naive.step))
        if len(admitted) < min(most, len(absent)):  # it stopped because nobody may leave
            assert len(naive.where) == naive.slots
            assert not naive.victims(spared=due)

    @rule(block=st.integers(0, 2), wanted=st.sets(st.integers(0, 4)))
    def withdraw(self, block: int, wanted: set[int]) -> None:
        naive = self.naive
        wrong = {
            key for key in naive.where if key[0] == block and key[1] not in wanted
            and naive.newest("foretold came use", key) == "foretold"
        }  # fmt: skip
        assert self.cache.withdraw(block, wanted) == [naive.where[key] for key in sorted(wrong)]
        naive.where = {key: slot for key, slot in naive.where.items() if key not in wrong}

    @precondition(lambda self: set(self.naive.where) - set(self.naive.pinned))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        free = sorted(set(self.naive.where) - set(self.naive.pinned))
        key = data.draw(st.sampled_from(free))
        self.cache.drop(key)
        del self.naive.where[key]

    @rule(slots=st.integers(0, 9))
    def shrink(self, slots: int) -> None:
        naive = self.naive
        assume(slots == 0 or slots >= naive.slots - 1)  # slowly, so that slots are left
        leaving = {key for key, slot in naive.where.items() if slot >= slots}
        if not 0 < slots <= naive.slots or leaving & set(naive.pinned):
            with pytest.raises(InputError, match=r"cannot shrink|in use"):
                self.cache.shrink(slots)
            return
        assert set(self.cache.shrink(slots)) == leaving
        naive.slots = slots
        naive.where = {key: slot for key, slot in naive.where.items() if slot < slots}

    @rule(more=st.integers(-1, 3))
    def grow(self, more: int) -> None:
        slots = self.naive.slots + more
        if more < 0:
            with pytest.raises(InputError, match="cannot grow"):
                self.cache.grow(slots)
            return
        self.cache.grow(slots)
        self.naive.slots = slots

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache, naive = self.cache, self.naive
        assert (cache.slots, cache.step, len(cache)) == (naive.slots, naive.step, len(naive.where))
        assert {key: cache.slot(key) for key in naive.where} == naive.where
        assert len(set(naive.where.values())) == len(naive.where) <= naive.slots
        assert all(key in cache for key in naive.pinned)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_does_what_a_naive_model_does(policy: str) -> None:
    kind = type(f"{policy}Machine", (Machine,), {"policy": policy})
    many = settings(max_examples=70, stateful_step_count=50, deadline=None)  # 10,500 operations
    run_state_machine_as_test(kind, settings=many)


def test_lru_takes_the_one_unused_for_longest() -> None:
    usage = Usage(last={(0, 0): 3, (0, 1): 2, (0, 2): 5})
    assert min(usage.last, key=lambda key: lru(key, usage, 6)) == (0, 1)


def test_lfu_takes_the_rarest_and_of_those_the_oldest() -> None:
    usage = Usage()
    for step, expert in enumerate((0, 1, 0, 2), 1):
        usage.use([(0, expert), (expert, 9)], step)
    rarest = sorted([(0, 0), (0, 1), (0, 2)], key=lambda key: lfu(key, usage, 5))
    assert rarest == [(0, 1), (0, 2), (0, 0)]
    usage = Usage(last={(0, 3): 2, (0, 4): 1})
    assert lfu((0, 4), usage, 5) < lfu((0, 3), usage, 5)


def test_lfu_remembers_what_left_and_forgets_what_was_long_ago() -> None:
    def left(others: int) -> Key | None:
        cache = Cache(2, lfu)
        often = [[(0, 1)]] * 5 + [[(0, 2), (0, 3)], [(0, 1)]]  # 1 has left, and is back
        for keys in often + [[(0, 2)]] * others + [[(0, 3)]]:
            admitted = cache.request(keys)
            cache.release(keys)
        return admitted[-1].evicted

    assert (left(1), left(60)) == ((0, 2), (0, 1))


def test_what_other_blocks_ask_for_fades_nothing() -> None:
    usage = Usage()
    usage.use([(0, 1)], 1)
    usage.use([(1, 1)], 2)
    assert usage.often((0, 1)) == 1.0
    usage.use([(0, 2)], 3)
    assert usage.often((0, 1)) == FADE


def test_lfu_lets_what_is_predicted_stay() -> None:
    cache = Cache(2, lfu)
    cache.release(one.key for one in cache.request([(0, 1)]))
    cache.predict([(0, 3)], cache.step + 2, 1)
    assert [one.evicted for one in cache.request([(1, 5)])] == [(0, 1)]


def test_what_was_predicted_and_not_asked_for_leaves_with_its_slot() -> None:
    cache = Cache(4, lfu)
    cache.release(one.key for one in cache.request([(0, 1)]))
    cache.predict([(0, 1), (0, 2), (0, 3), (1, 2)], cache.step + 1, 3)
    assert cache.withdraw(0, [1, 3]) == [1]  # another block's guess stays
    cache.release(one.key for one in cache.request([(0, 1), (0, 3)]))
    assert set(cache) == {(0, 1), (0, 3), (1, 2)}
    assert cache.withdraw(0, []) == []  # what was asked for once is no guess any more


def test_what_the_same_call_asks_for_later_leaves_last_and_the_latest_of_it_first() -> None:
    def left(*then: int) -> list[Key | None]:
        cache = Cache(4, lru)
        cache.release(one.key for one in cache.request([(0, n) for n in (1, 2, 3, 4)]))
        return [one.evicted for one in cache.request([(0, 8), (0, 9)], [(0, n) for n in then])]

    assert left() == [(0, 1), (0, 2)]
    assert left(1, 2) == [(0, 3), (0, 4)]
    assert left(2, 1, 4) == [(0, 3), (0, 4)]
    assert left(4, 3, 2, 1) == [(0, 1), (0, 2)]
    assert left(1, 2, 3, 4) == [(0, 4), (0, 3)]


def test_lookahead_spares_what_is_predicted_soonest() -> None:
    usage = Usage(last={(0, e): e for e in range(4)}, due={(0, 0): 9, (0, 1): 7, (0, 3): 6})
    order = sorted(usage.last, key=lambda key: lookahead(key, usage, 6))
    assert order == [(0, 2), (0, 3), (0, 0), (0, 1)]  # 3 was predicted for now, and did not come


def test_a_refused_request_changes_nothing() -> None:
    cache = Cache(2, lru)
    cache.request([(0, 0)])
    with pytest.raises(InputError, match="2 experts have to come into 1 of 2 slots"):
        cache.request([(0, 1), (0, 2)])
    assert cache.step == 1
    assert [one.hit for one in cache.request([(0, 0), (0, 1)])] == [True, False]


def test_an_expert_named_twice_takes_one_slot() -> None:
    first, second = Cache(1, lru).request([(0, 3), (0, 3)])
    assert (first.hit, second.hit, first.slot) == (False, True, second.slot)


def test_releasing_twice_leaves_no_pin() -> None:
    cache = Cache(1, lru)
    cache.request([(0, 0)])
    cache.release([(0, 0), (0, 0)])
    assert cache.request([(0, 1)])[0].evicted == (0, 0)


def misses(requests: Sequence[Sequence[Key]], slots: int) -> int:
    """Replay with the future known."""
    future: dict[Key, list[int]] = {}
    for step in range(len(requests), 0, -1):
        for key in requests[step - 1]:
            future.setdefault(key, []).append(step)
    cache = Cache(slots, belady(future))
    count = 0
    for keys in requests:
        count += sum(not one.hit for one in cache.request(keys))
        cache.release(keys)
    return count


def fewest(requests: Sequence[Sequence[Key]], slots: int) -> int:
    """Try every choice of victims."""
    states = {frozenset[Key](): 0}
    for keys in requests:
        after: dict[frozenset[Key], int] = {}
        for held, count in states.items():
            others = held - set(keys)
            stay = min(len(others), slots - len(keys))
            for kept in itertools.combinations(sorted(others), stay):
                new = frozenset(kept) | set(keys)
                cost = count + len(set(keys) - held)
                after[new] = min(cost, after.get(new, cost))
        states = after
    return min(states.values())


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.lists(st.tuples(st.just(0), st.integers(0, 5)), min_size=1, max_size=2, unique=True),
        min_size=1, max_size=9,
    ),
    slots=st.integers(2, 4),
)  # fmt: skip
def test_belady_has_the_fewest_misses_there_can_be(requests: list[list[Key]], slots: int) -> None:
    assert misses(requests, slots) == fewest(requests, slots)
