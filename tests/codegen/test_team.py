"""How many threads a call of a native kernel asks for, beside other work and in a forked child."""

import ctypes
import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moecc.codegen.native import emit
from moecc.codegen.native.build import load
from tests.codegen.native_cases import make_batch, make_experts, make_spec

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)

PROGRAM = """
extern "C" Team* make() { return new Team; }
extern "C" void drop(Team* team) { delete team; }
extern "C" int size(Team* team, int64_t threads, int64_t now) { return team->size(threads, now); }
extern "C" void record(Team* team, int64_t threads, int size, int64_t start, int64_t end,
                       int64_t waited) {
  team->record(threads, size, start, end, waited);
}
"""


@functools.cache
def library() -> ctypes.CDLL:
    lib = load(emit.template("vec.h") + emit.template("team.h") + PROGRAM)
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.make.restype = pointer
    lib.drop.argtypes = [pointer]
    lib.size.argtypes = [pointer, long, long]
    lib.record.argtypes = [pointer, long, number, long, long, long]
    return lib


class Team:
    """A team with a clock of its own, in milliseconds."""

    def __init__(self, threads: int) -> None:
        self.lib, self.threads, self.now = library(), threads, 0.0
        self.handle = self.lib.make()

    def __del__(self) -> None:
        self.lib.drop(self.handle)

    @property
    def size(self) -> int:
        return self.lib.size(self.handle, self.threads, self._nanoseconds())

    def _nanoseconds(self) -> int:
        return round(self.now * 1e6)

    def calls(self, count: int, took: float, waited: float) -> None:
        for _ in range(count):
            size, start = self.size, self._nanoseconds()
            self.now += took
            if size > 1:
                times = start, self._nanoseconds(), round(waited * 1e6)
                self.lib.record(self.handle, self.threads, size, *times)


def test_a_team_on_time_stays_whole():
    team = Team(8)
    team.calls(100, took=10, waited=1)
    assert team.size == 8


def test_one_late_call_is_chance():
    team = Team(2)
    team.calls(30, took=1, waited=0.1)
    team.calls(1, took=8, waited=7)
    assert team.size == 2
    team.calls(30, took=1, waited=0.1)
    team.calls(1, took=8, waited=7)
    assert team.size == 2


def test_waiting_less_than_a_slice_is_no_sign_of_others():
    team = Team(2)
    team.calls(100, took=0.8, waited=0.7)
    assert team.size == 2


def test_a_thread_that_is_always_late_is_left_out():
    team = Team(2)
    team.calls(30, took=1, waited=0.1)
    team.calls(3, took=8, waited=7)
    assert team.size == 1
    team = Team(8)
    team.calls(30, took=2, waited=0.1)
    team.calls(2, took=10, waited=8)
    team.calls(9, took=3, waited=0.1)
    assert 6 <= team.size < 8


def test_waiting_that_costs_less_than_a_thread_does_is_borne():
    team = Team(2)
    team.calls(50, took=100, waited=30)
    assert team.size == 2
    team = Team(8)
    team.calls(1, took=100, waited=30)
    assert team.size == 7


def test_the_thread_comes_back_when_the_core_is_free():
    team = Team(2)
    team.calls(4, took=3, waited=2)
    assert team.size == 1
    team.now += 41
    assert team.size == 2
    team.calls(1, took=3, waited=2)  # still taken
    assert team.size == 1
    team.now += 41
    team.calls(1, took=1, waited=0.1)
    assert team.size == 2


def test_somebody_computes_however_late_all_are():
    team = Team(3)
    team.calls(200, took=40, waited=39)
    assert team.size == 1
    team.threads = 1
    assert team.size == 1
    team.threads = 2
    assert team.size in (1, 2)


def test_threads_that_call_at_once_get_their_own_results():
    spec = make_spec("silu", torch.float32, h=300, i=200)
    experts, batches = make_experts(spec), [make_batch(spec, t, 2) for t in (1, 9, 40, 70)]
    run = emit.emit(spec).run
    want = [run(*batch, *experts) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            got = list(pool.map(lambda batch: run(*batch, *experts), batches))
            assert all(map(torch.equal, got, want))


CHILD = """
import os, signal, torch
from moecc.codegen.native.emit import emit
from tests.codegen.native_cases import make_batch, make_experts, make_spec
torch.set_num_threads(2)
spec = make_spec("silu", torch.float32)
batch, experts, run = make_batch(spec, 20, 2), make_experts(spec), emit(spec).run
want = run(*batch, *experts)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(run(*batch, *experts), want) else 1)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_computes_alone_and_does_not_hang():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n", done.stderr
