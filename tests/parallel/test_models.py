"""Models whose experts ranks share say what they say alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moecc
from moecc import backend
from moecc.checkpoint import recipes
from moecc.parallel import shares_of
from moecc.runtime.errors import OptionError
from moecc.tiny import tiny_model
from tests.loops import WhereLoop
from tests.models import BatchedMoe, relative_error, tokens
from tests.parallel.ranks import on_ranks

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def compiled(model: Any, tokens: str, inner: str = "eager") -> Any:
    assert backend.moecc
    options = {"inner": inner, "strict": True, "expert_parallel": 2, "tokens": tokens}
    return torch.compile(model, backend="moecc", fullgraph=True, dynamic=True, options=options)


def check_families(rank: int) -> None:
    """One graph for all token counts; mixtral outside Dynamo, qwen3_moe in `check_loading`."""
    roads = (("deepseek_v3", "split"), ("mixtral", "replicated"))
    for family, own in roads:
        model, plain = (tiny_model(family, torch.float32) for _ in range(2))
        model.load_state_dict(plain.state_dict())
        shared = compiled(model, own)
        road = model if family == "mixtral" else shared
        for ids in (IDS, IDS[:, :4].contiguous()):
            mine = ids if own == "replicated" else ids[: 2 + rank]
            got, expected = road(mine).logits, plain(mine).logits
            assert relative_error(got, expected) < 1e-5
            assert torch.equal(got.argmax(-1), expected.argmax(-1))
        report = moecc.report(model)
        assert len(report.graphs) == int(family != "mixtral")
        assert {share.tokens for share in report.parallel} == {len(mine) * 11}
        assert f"{own} over 2 ranks" in str(report)
    length: Any = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(mine, **length), plain.generate(mine, **length))


def check_written_by_hand(rank: int) -> None:
    ways = (
        (BatchedMoe(torch.float32), "inductor", "replicated"),
        (WhereLoop().eval(), "eager", "split"),
    )
    for model, inner, own in ways:
        torch.manual_seed(rank if own == "split" else 7)
        x = tokens(4, torch.float32)
        expected = model(x)
        assert relative_error(compiled(model, own, inner)(x), expected) < 1e-5
        (share,) = moecc.report(model).parallel
        assert share.tokens == 4


def check_loading(rank: int, folder: Path) -> None:
    read = [0]
    original = recipes.read_tensor

    def counting(tensor: Any) -> torch.Tensor:
        found = original(tensor)
        read[0] += found.nbytes
        return found

    recipes.read_tensor = counting
    plain = moecc.load(folder)
    model = moecc.load(folder, expert_parallel=2)
    blocks = [name for name, one in plain.named_parameters() if one.dim() == 3]
    whole = sum(plain.get_parameter(name).nbytes for name in blocks)
    assert read[0] == whole // 2
    options: Any = {"inner": "eager", "strict": True}  # with whom is known since it was loaded
    road = torch.compile(model, backend="moecc", fullgraph=True, dynamic=True, options=options)
    for ids in (IDS[:, :4].contiguous(), IDS):
        expected = plain(ids).logits
        for got in (model(ids).logits, road(ids).logits):
            assert relative_error(got, expected) < 1e-5
    assert len(moecc.report(model).graphs) == 1
    for _, _, share in shares_of(model):
        share.load[5] += 100  # so popular that it gets a copy
    moved = moecc.balance(model, spare=1)
    assert all(one.after < one.before for one in moved)
    assert read[0] == whole // 2 + sum(one.read for one in moved) * whole // 16
    assert relative_error(road(IDS).logits, expected) < 1e-5
    assert moecc.report(model).parallel[0].copies > 0
    assert [one.read for one in moecc.balance(model, spare=1)] == [0, 0]
    lent = moecc.load(folder, expert_parallel=2, expert_memory="50%")
    assert relative_error(lent(IDS).logits, expected) < 1e-5
    counts = moecc.report(lent).experts
    assert counts is not None
    assert counts.read_bytes <= whole // 2


def check_a_model_that_transformers_sharded(folder: Path) -> None:
    """Transformers' own expert parallelism is left alone; its local experts are found."""
    sharded = {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)}
    model = AutoModelForCausalLM.from_pretrained(folder, **sharded).eval()
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    shared = torch.compile(model, backend="moecc", options={"inner": "eager"})
    assert relative_error(shared(IDS).logits, expected) < 1e-5
    assert [block["experts"] for block in moecc.report(model).graphs[0].blocks] == [4, 4]
    with pytest.raises(OptionError, match="sharded already"):
        compiled(model, "replicated")


def check_models(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    check_families(rank)
    check_written_by_hand(rank)
    check_loading(rank, folder)
    check_a_model_that_transformers_sharded(folder)


def test_two_ranks_compute_what_one_process_does_and_read_half_of_the_experts(
    tmp_path: Path,
) -> None:
    tiny_model("qwen3_moe", torch.float32).save_pretrained(tmp_path)
    on_ranks(2, check_models, tmp_path)
