"""What a process compiled is found by the next one, and never taken for something else."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.utils import fresh_cache

from moecc import inner, vector_isa
from moecc.codegen.native import build
from tests.models import HIDDEN, tokens

TINY = 'extern "C" int answer() { return 42; }\n'


def compile_anew(outputs: int = HIDDEN) -> tuple[int, int]:
    """Compile a model as a new process would; give inductor's hits and misses.

    A product alone has no loop that a C++ compiler would be called for.
    """
    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(nn.Linear(HIDDEN, outputs, bias=False), backend="moecc")
    with torch.no_grad():
        call(tokens(4, torch.float32))
    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"]


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "our operators": lambda patch: patch.setattr(inner, "fingerprint", lambda: "another"),
    "torch": lambda patch: patch.setattr(codecache, "torch_key", lambda: b"another"),
    "the machine": lambda patch: patch.setattr(
        codecache.CacheBase, "get_system", staticmethod(lambda: {"hash": "another"})
    ),
    "inductor's settings": lambda patch: patch.setattr(inner, "_LEAST_CHUNK", 2**15),
}


@pytest.fixture(scope="module")
def compiled_once() -> Any:
    """Keep what is compiled in a folder of its own, with one model in it."""
    with fresh_cache():
        assert compile_anew() == (0, 1)
        yield


def test_the_same_model_is_found_again(compiled_once: object) -> None:
    assert compile_anew() == (1, 0)


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_compiled_with_another_one_is_not_taken(
    what: str, compiled_once: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGES[what](monkeypatch)
    assert compile_anew() == (0, 1)


def test_another_model_is_not_taken(compiled_once: object) -> None:
    assert compile_anew(2 * HIDDEN) == (0, 1)


def test_the_fingerprint_is_that_of_our_version_our_operators_and_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken() -> str:
        inner.fingerprint.cache_clear()
        return inner.fingerprint()

    own = taken()
    with monkeypatch.context() as patch:
        for name, other in (("__version__", "another"), ("cpu_identity", lambda: "another")):
            with monkeypatch.context() as one_thing:
                one_thing.setattr(inner, name, other)
                assert taken() != own
        with monkeypatch.context() as one_thing:
            one_thing.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
            assert taken() != own
        patch.setattr(inner.runtime, "__file__", str(tmp_path / "__init__.py"))
        (tmp_path / "ops.py").write_text("one\n")
        first = taken()
        (tmp_path / "ops.py").write_text("other\n")
        assert taken() != first
    assert taken() == own


def test_a_library_is_kept_by_all_that_decides_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = build.find_compiler()
    libraries = [build.build(TINY, compiler), build.build(TINY + "\n", compiler)]
    with monkeypatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1")
        libraries.append(build.build(TINY, compiler))
    for name in ("cpu_identity", "_version"):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, lambda *_: "another")
            libraries.append(build.build(TINY, compiler))
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
        libraries.append(build.build(TINY, compiler))
    assert len({*libraries}) == len(libraries)
    assert build.build(TINY, compiler) == libraries[0]


def test_instruction_sets_that_worked_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def probe(_: Any, code: str) -> bool:
        tried.append(code)
        return code != "broken"

    def tries(code: str) -> int:
        """Find instruction sets as a new process would, and count the probes."""
        monkeypatch.setattr(
            cpu_vec_isa, "valid_vec_isa_list", lambda: cpu_vec_isa.VecAVX2().check_build(code)
        )
        before = len(tried)
        vector_isa.find_vector_isa.__wrapped__()
        return len(tried) - before

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", probe)
    assert [tries("one"), tries("one"), tries("other"), tries("other")] == [1, 0, 1, 0]
    assert [tries("broken"), tries("broken")] == [1, 1], "a compiler may be installed meanwhile"
    monkeypatch.setattr(vector_isa, "cpu_identity", lambda: "another")
    assert tries("one") == 1
    monkeypatch.setattr(torch, "__version__", "another")
    assert [tries("one"), tries("one")] == [1, 0]


RACER = """
import torch
from torch import nn
from torch._dynamo.utils import counters
from tests.models import BatchedMoe, tokens

torch.manual_seed(0)
call = torch.compile(BatchedMoe(torch.float32), backend="moecc")
with torch.no_grad():
    print(call(tokens(4, torch.float32)).sum().item())
print(counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_two_processes_may_start_with_empty_caches_at_once(tmp_path: Path) -> None:
    homes = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {**os.environ, **{home: str(tmp_path / home) for home in homes}}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RACER]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    racing = [start(), start()]
    first, second = (process.communicate()[0].split() for process in racing)
    after = start().communicate()[0].split()
    assert first[0] == second[0] == after[0]
    assert after[1] == "0", "a third finds what they left"
