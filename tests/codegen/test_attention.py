"""Native attention of few query tokens: same numbers as float64, whatever is masked or shared."""

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moecc.codegen.native import attention
from moecc.runtime import attention as operator
from moecc.runtime.errors import InputError, UnsupportedSpec
from tests.codegen.sanitized import Found, run_sanitized

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)

EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
MASKS = ["none", "causal", "bool", "added", "window", "heads"]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool, float]


def make_case(
    dtype: torch.dtype,
    mask: str = "none",
    tokens: int = 1,
    keys: int = 200,
    shared: int = 2,
    groups: int = 4,
    depth: int = 64,
    width: int | None = None,
) -> Case:
    """Make what the operator is given: two sequences, `shared` heads of keys for `groups` each."""
    query = torch.randn(2, tokens, shared * groups, depth).to(dtype).transpose(1, 2)
    key = torch.randn(2, shared, keys, depth).to(dtype)
    value = torch.randn(2, shared, keys, width or depth).to(dtype)
    seen = torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None]
    masks = {
        "bool": torch.rand(2, 1, tokens, keys) < 0.5,
        "added": torch.randn(1, 1, tokens, keys).to(dtype),
        "window": (seen & ~seen.roll(20, 1))[None, None].expand(2, -1, -1, -1),
        "heads": (torch.randn(shared * groups, tokens, 1) * torch.arange(keys) / keys).to(dtype),
    }
    return query, key, value, masks.get(mask), mask == "causal", depth**-0.5


def expected(case: Case) -> torch.Tensor:
    query, key, value, mask, causal, scale = case
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    tensors = (one.double() for one in (query, key, value))
    return functional.scaled_dot_product_attention(
        *tensors, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def assert_exact(got: torch.Tensor, case: Case) -> None:
    assert got.dtype == case[0].dtype
    most = float(case[2].abs().max()) if case[2].numel() else 0
    torch.testing.assert_close(got.double(), expected(case), rtol=0, atol=EPS[got.dtype] * most)


@pytest.mark.parametrize(
    ("dtype", "machine"),
    [
        *((dtype, "native") for dtype in attention.DTYPES),
        (torch.bfloat16, "haswell"),
        (torch.float16, "x86-64"),
    ],
    ids=str,
)
@settings(max_examples=20, deadline=None)
@given(
    mask=st.sampled_from(MASKS), tokens=st.integers(1, 8), keys=st.integers(8, 400),
    shared=st.integers(1, 3), groups=st.sampled_from([1, 2, 7, 8]),
    depth=st.sampled_from([1, 16, 64, 72, 100, 128]), width=st.sampled_from([None, 5, 32, 192]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_computes_what_float64_says(
    dtype, machine, mask, tokens, keys, shared, groups, depth, width, seed
):
    torch.manual_seed(seed)
    case = make_case(dtype, mask, tokens, keys, shared, groups, depth, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
        attention._load.cache_clear()
        out = attention.emit(dtype).run(*case)
    attention._load.cache_clear()
    assert_exact(out, case)


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
def test_results_do_not_depend_on_the_threads(dtype):
    case = make_case(dtype, "bool", tokens=3, keys=1000)
    run, before = attention.emit(dtype).run, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(*case)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(*case), alone)
    finally:
        torch.set_num_threads(before)


def test_tensors_may_lie_anywhere():
    query, key, value, *rest = make_case(torch.bfloat16)
    run = attention.emit(torch.bfloat16).run
    plain = run(query, key, value, *rest)
    caches = torch.zeros(2, 2, 300, 2, 67, dtype=torch.bfloat16)  # [.., S, heads, D], both in one
    apart = [cache[:, 50:250, :, 3:].transpose(1, 2) for cache in caches]
    for one, tensor in zip(apart, (key, value), strict=True):
        one.copy_(tensor)
    assert torch.equal(run(query.contiguous(), *apart, *rest), plain)
    turned = [one.mT.contiguous().mT for one in (query, key, value)]
    assert torch.equal(run(*turned, *rest), plain)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_closed_keys_are_not_read(dtype):
    """As at the end of a static cache, and before a sliding window."""
    query, key, value, *_ = make_case(torch.bfloat16, keys=600)
    mask = torch.zeros(1, 1, 1, 600, dtype=torch.bool)
    mask[..., 150:333] = True
    if dtype != torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
    run, scale = attention.emit(torch.bfloat16).run, 0.125
    parts = key[:, :, 150:333], value[:, :, 150:333]
    assert_exact(run(query, key, value, mask, False, scale), (query, *parts, None, False, scale))
    for tensor in (key, value):
        tensor[:, :, :150] = tensor[:, :, 333:] = float("nan")
    assert run(query, key, value, mask, False, scale).isfinite().all()


@pytest.mark.parametrize("lowest", [None, -torch.inf, torch.finfo(torch.float32).min])
def test_a_token_without_keys_is_what_it_is_in_torch(lowest):
    """Nothing at all is open to it, or everything is equally closed."""
    query, key, value, mask, *_ = make_case(torch.float32, "bool", tokens=3)
    mask[:, :, 1] = False
    if lowest is not None:
        mask = torch.where(mask, 0.0, lowest)
    case = (query, key, value, mask, False, 0.125)
    out = attention.emit(torch.float32).run(*case)
    assert_exact(out, case)
    mean = lowest not in (None, -torch.inf)
    assert bool(out[:, :, 1].any()) == mean


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(bad):
    case = make_case(torch.float32, tokens=2)
    run = attention.emit(torch.float32).run
    clean = run(*case)
    case[1][1, 0, 190, 7] = bad
    out = run(*case)
    assert out[1, :4].isnan().any()
    assert torch.equal(out.isnan(), expected(case).isnan())
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, 4:], clean[1, 4:])


def test_no_keys_and_no_tokens_are_nothing():
    run = attention.emit(torch.float32).run
    assert not run(*make_case(torch.float32, keys=0)).any()
    assert run(*make_case(torch.float32, tokens=0)).shape == (2, 8, 0, 64)


def test_an_input_that_does_not_fit_is_named():
    query, key, value, *rest = make_case(torch.float32)
    run = attention.emit(torch.float32).run
    with pytest.raises(
        InputError, match=r"key is torch.float16 .*takes torch.float32, 4-d, on cpu"
    ):
        run(query, key.half(), value, *rest)
    with pytest.raises(InputError, match=r"value \[2, 2, 199, 64\]; a key and a value serve"):
        run(query, key, value[:, :, 1:], *rest)
    with pytest.raises(InputError, match="groups of queries"):
        run(query[:, :5], key, value, *rest)
    with pytest.raises(InputError, match=r"mask is torch.int64 .*broadcasts to \[2, 8, 1, 200\]"):
        run(query, key, value, torch.ones(1, 200, dtype=torch.int64), False, 1.0)
    with pytest.raises(InputError, match=r"mask is torch.bool \[201\]"):
        run(query, key, value, torch.ones(201, dtype=torch.bool), False, 1.0)
    with pytest.raises(UnsupportedSpec, match="float64 none"):
        attention.emit(torch.float64)


def test_the_operator_and_its_fake_agree():
    kernel = attention.emit(torch.float32)
    operator.install(kernel.key, kernel.run)
    for case in (make_case(torch.float32, "bool", 3), make_case(torch.float32, width=32)):
        torch.library.opcheck(
            torch.ops.moecc.attention.default,
            (*case, kernel.key),
            test_utils=("test_schema", "test_faketensor"),
        )
    with pytest.raises(InputError, match="'another' is not installed in this process"):
        torch.ops.moecc.attention(*case, "another")


@pytest.mark.parametrize(
    ("dtype", "machine"), [(torch.bfloat16, "native"), (torch.float32, "haswell")], ids=str
)
def test_the_sanitizers_find_nothing(dtype, machine, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
    for mask in MASKS:
        case = make_case(dtype, mask, 3, keys=133, groups=3, depth=37, width=21)
        assert_exact(run_sanitized((attention, dtype), *case), case)
    assert_exact(run_sanitized((attention, dtype), *(case := make_case(dtype, keys=1))), case)


def test_the_sanitizers_find_a_planted_mistake():
    case = make_case(torch.float32, keys=133)
    change = ("std::min(from + KEYS, call.S)", "from + KEYS")
    with pytest.raises(Found, match="heap-buffer-overflow"):
        run_sanitized((attention, torch.float32), *case, change=change)
