"""Speculation gives the text of plain generation, whatever is drafted."""

import re
import threading
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer, StoppingCriteriaList, StopStringCriteria

import moecc
from moecc import backend, capture
from moecc.passes.options import Options
from moecc.runtime.depth import MOST, Depth
from moecc.runtime.errors import InputError, OptionError
from moecc.runtime.rent import Rent
from moecc.runtime.twins import drafting, twin_of
from moecc.speculation import speculate as speculation
from moecc.speculation.accept import Proposal
from moecc.speculation.drafts import SelfDraft
from moecc.speculation.known import Speculation, known, speculations
from moecc.tiny import tiny_model
from tests.test_load import banks

REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference"
IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 3, 64, 12]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def adopted(family: str, **changes: Any) -> Any:
    model: Any = tiny_model(family, **changes)
    model.generation_config.eos_token_id = None
    assert backend.moecc  # importing it installs the hooks
    capture.adopt(model, Options())
    return model


def loaded(folder: Path, **options: Any) -> Any:
    model: Any = moecc.load(folder, **options)
    model.generation_config.eos_token_id = None
    return model


def tiny(seed: int = 0) -> Any:
    model: Any = tiny_model("qwen3_moe", seed=seed)
    model.generation_config.eos_token_id = None
    return model


def only(model: Any) -> Speculation:
    (about,) = speculations(model)
    return about


@pytest.mark.parametrize("k", [0, 1, 2, 5, 8, "auto"])
def test_the_text_is_the_same_at_every_depth(k: int | str) -> None:
    model = adopted("qwen3_moe")
    expected = model.generate(IDS, **SETTINGS)
    about = known(model, "int4", MOST)
    about.depth.credit = 1e9  # auto may try at once
    given = model.generate(IDS, custom_generate=moecc.speculate(k), **SETTINGS)
    assert torch.equal(given, expected)
    assert about.tokens == SETTINGS["max_new_tokens"] - 1
    assert (about.drafted > 0) == (k != 0)
    assert about.twins.missing == 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("draft", ["int8", "int2"])  # mostly right, mostly wrong
def test_every_kind_of_cache_can_take_tokens_back(family: str, cache: str, draft: str) -> None:
    window = {"sliding_window": 8} if family in ("mixtral", "gpt_oss") else {}
    model = adopted(family, **window)
    how = SETTINGS | {"cache_implementation": cache}
    expected = model.generate(IDS, **how)
    given = model.generate(IDS, custom_generate=moecc.speculate(4, draft=draft), **how)
    assert torch.equal(given, expected)


def test_a_state_that_cannot_be_taken_back_is_refused() -> None:
    model = adopted("qwen3_next")
    with pytest.raises(InputError, match="cannot be taken back"):
        model.generate(IDS, custom_generate=moecc.speculate(), **SETTINGS)


def test_it_drafts_from_the_prompt_and_with_another_model() -> None:
    model, assistant = adopted("qwen3_moe"), tiny(seed=1)
    expected = model.generate(IDS, **SETTINGS)
    for draft in ("prompt", assistant, model):
        given = model.generate(IDS, custom_generate=moecc.speculate(3, draft=draft), **SETTINGS)
        assert torch.equal(given, expected)
    by_itself = speculations(model)[-1]
    assert by_itself.accepted == by_itself.drafted > 0


def test_samples_are_those_of_the_model() -> None:
    """With a draft that is the model itself, whatever is drawn stays."""
    model = adopted("qwen3_moe")
    how = SETTINGS | {"do_sample": True, "top_k": 20}
    model.generate(IDS, custom_generate=moecc.speculate(3, draft=model), **how)
    assert only(model).accepted == only(model).drafted > 0
    text = model.generate(IDS, custom_generate=moecc.speculate(3), **how)
    assert text.shape == (1, IDS.shape[1] + SETTINGS["max_new_tokens"])


def test_it_stops_where_plain_generation_stops() -> None:
    model = adopted("qwen3_moe")
    plain = model.generate(IDS, **SETTINGS)[0, IDS.shape[1] :].tolist()
    end = next(token for token in plain[5:] if token not in plain[:5])
    for how in ({"eos_token_id": end}, {"max_new_tokens": 1}, {"max_new_tokens": 7}):
        expected = model.generate(IDS, **(SETTINGS | how))
        given = model.generate(IDS, custom_generate=moecc.speculate(6), **(SETTINGS | how))
        assert torch.equal(given, expected)


def test_it_stops_at_strings_and_streams_each_token_once() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    tokenizer = cast(Any, AutoTokenizer).from_pretrained(REFERENCE)
    model = loaded(REFERENCE, dtype=torch.float32)
    ids = tokenizer("In the beginning", return_tensors="pt").input_ids
    how = SETTINGS | {"max_new_tokens": 40}
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, ["the"])])
    expected = model.generate(ids, stopping_criteria=stop, **how)
    streamer = Streamer()
    given = model.generate(
        ids,
        stopping_criteria=stop,
        streamer=streamer,
        custom_generate=moecc.speculate(5, streamer=streamer),
        **how,
    )
    assert torch.equal(given, expected)
    assert given.shape[1] < ids.shape[1] + 40
    assert streamer.tokens == given[0].tolist()
    assert streamer.ended


def test_what_it_returns_can_be_continued() -> None:
    model = adopted("qwen3_moe")
    how = SETTINGS | {"return_dict_in_generate": True, "output_scores": True}
    first = model.generate(IDS, custom_generate=moecc.speculate(5), **how)
    assert len(first.scores) == SETTINGS["max_new_tokens"]
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    assert torch.stack(first.scores).argmax(-1).flatten().equal(first.sequences[0, IDS.shape[1] :])
    cache = first.past_key_values
    more = model.generate(first.sequences, past_key_values=cache, **SETTINGS)
    assert torch.equal(more, model.generate(first.sequences, **SETTINGS))


def test_a_compiled_model_drafts_in_the_same_graphs() -> None:
    model = adopted("qwen3_moe")
    expected = model.generate(IDS, **SETTINGS)
    model.forward = torch.compile(
        model.forward, backend="moecc", dynamic=True, options={"inner": "eager"}
    )
    given = model.generate(IDS, custom_generate=moecc.speculate(3), **SETTINGS)
    assert torch.equal(given, expected)
    assert only(model).twins.missing == 0
    graphs = len(moecc.report(model).graphs)
    for k in (2, 5):
        model.generate(IDS, custom_generate=moecc.speculate(k), **SETTINGS)
    assert len(moecc.report(model).graphs) == graphs


def test_the_report_says_what_each_depth_would_give() -> None:
    model = adopted("qwen3_moe")
    for k in (2, "auto"):
        model.generate(IDS, custom_generate=moecc.speculate(k), **SETTINGS)
    report = moecc.report(model)
    (about,) = report.to_dict()["speculation"]
    assert [one["k"] for one in about["depths"]] == list(range(9))
    assert about["drafted"] >= about["accepted"]
    assert f"drafts by int4: {about['tokens']} tokens in {about['cycles']} passes" in str(report)
    assert re.search(
        r"k=8: \d\.\d\d tokens / [\d.]+ ms, of which [\d.]+ drafting and [\d.]+ verifying",
        str(report),
    )


@pytest.mark.parametrize("memory", ["50%", "75%"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_it_drafts_with_the_experts_that_are_cached(
    memory: str, quantize: str | None, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    model = loaded(tmp_path, expert_memory=memory, quantize=quantize)
    expected = model.generate(IDS, **SETTINGS)
    slots = [bank.pool.slots for bank in banks(model)]
    for k in (1, 4, "auto"):
        given = model.generate(IDS, custom_generate=moecc.speculate(k), **SETTINGS)
        assert torch.equal(given, expected)
    about = only(model)
    assert (about.source, about.copied, about.twins.missing) == ("cached", 0, 0)
    assert 0 < about.accepted <= about.drafted
    assert [bank.pool.slots for bank in banks(model)] == slots
    for draft in ("prompt", tiny(seed=1)):  # others draft for experts on disk, too
        given = model.generate(IDS, custom_generate=moecc.speculate(3, draft=draft), **SETTINGS)
        assert torch.equal(given, expected)


def test_a_cache_is_needed_to_draft_with_it() -> None:
    model = adopted("qwen3_moe")
    with pytest.raises(InputError, match="expert_memory"):
        model.generate(IDS, custom_generate=moecc.speculate(draft="cached"), **SETTINGS)


def test_with_experts_on_disk_the_draft_names_what_is_read(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    plain = loaded(tmp_path)
    expected = plain.generate(IDS, **SETTINGS)
    model = loaded(tmp_path, expert_memory="75%")
    before = [bank.pool.slots * bank.store.layout.size for bank in banks(model)]
    given = model.generate(IDS, custom_generate=moecc.speculate(4, draft="int8"), **SETTINGS)
    assert torch.equal(given, expected)
    about = only(model)
    after = [bank.pool.slots * bank.store.layout.size for bank in banks(model)]
    assert 0 < about.copied <= sum(before) - sum(after)
    counts = [bank.pool.trace.counts for bank in banks(model)]
    assert sum(one.useful for one in counts) > 0


def test_copies_come_when_they_are_paid_for_and_give_their_slots_back(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    model = loaded(tmp_path, expert_memory="75%")
    expected = model.generate(IDS, **SETTINGS)
    before = [bank.pool.slots for bank in banks(model)]
    about = Speculation(source="int8", depth=Depth(), rent=Rent(price=1e-9, credit=-1e9))
    seen: list[tuple[bool, bool, int]] = []
    for credit, plain in ((-1e9, 1e9), (1.0, 1e9), (0.0, 1e-9)):
        assert about.rent is not None
        about.rent.credit, about.rent.plain = credit, plain
        with mock.patch.object(speculation, "known", return_value=about):
            given = model.generate(IDS, custom_generate=moecc.speculate(draft="int8"), **SETTINGS)
        assert torch.equal(given, expected)
        fewer = all(bank.pool.slots < own for bank, own in zip(banks(model), before, strict=True))
        seen.append((about.rent.held, fewer, about.rent.tries))
    assert seen == [(False, False, 0), (True, True, 1), (False, False, 1)]
    assert about.drafted > 0
    assert about.copied == 0 == len(about.twins.lenders)
    assert [bank.pool.slots for bank in banks(model)] == before


def test_copies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    model = loaded(tmp_path, expert_memory="50%")
    before = [bank.pool.slots for bank in banks(model)]
    with pytest.raises(OptionError, match="expert_memory"):
        model.generate(IDS, custom_generate=moecc.speculate(draft="int8"), **SETTINGS)
    assert [bank.pool.slots for bank in banks(model)] == before


def test_experts_that_are_packed_are_copied_with_fewer_bits(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    settings: tuple[dict[str, Any], ...] = ({}, {"expert_memory": "100%"})
    for how in settings:
        model = loaded(tmp_path, quantize="int8", **how)
        expected = model.generate(IDS, **SETTINGS)
        if how:
            with pytest.raises(OptionError, match="expert_memory"):
                model.generate(IDS, custom_generate=moecc.speculate(2, draft="int8"), **SETTINGS)
        else:
            given = model.generate(IDS, custom_generate=moecc.speculate(2), **SETTINGS)
            assert torch.equal(given, expected)
            assert only(model).accepted > 0


def test_an_interrupt_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adopted("qwen3_moe")
    expected = model.generate(IDS, **SETTINGS)
    layer = model.model.layers[1].mlp
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # in a draft: the prompt, two tokens of a draft, ...
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, custom_generate=moecc.speculate(5), **SETTINGS)
    handle.remove()
    assert twin_of(next(model.parameters())) is None
    assert torch.equal(model.generate(IDS, **SETTINGS), expected)
    given = model.generate(IDS, custom_generate=moecc.speculate(5), **SETTINGS)
    assert torch.equal(given, expected)


def test_other_threads_see_no_copies() -> None:
    model = adopted("qwen3_moe")
    model.generate(IDS, custom_generate=moecc.speculate(2), **SETTINGS)
    twins = only(model).twins
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    seen: list[object] = []
    with drafting(twins):
        assert twin_of(weight) is not None
        thread = threading.Thread(target=lambda: seen.append(twin_of(weight)))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_corrupted_draft_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adopted("qwen3_moe")
    expected = model.generate(IDS, **SETTINGS)
    propose = SelfDraft.propose

    def corrupted(self: SelfDraft, ids: torch.Tensor, depth: int) -> Proposal:
        right = propose(self, ids, depth)
        wrong = torch.where(torch.rand(len(right.tokens)) < 0.5, right.tokens + 1, right.tokens)
        return Proposal(tokens=wrong % model.config.vocab_size)

    monkeypatch.setattr(SelfDraft, "propose", corrupted)
    given = model.generate(IDS, custom_generate=moecc.speculate(4), **SETTINGS)
    assert torch.equal(given, expected)
    assert only(model).accepted < only(model).drafted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": -1}, "k is -1"),
        ({"k": "many"}, "k is 'many'"),
        ({"draft": "int5"}, "draft is 'int5'"),
        ({"draft": 3}, "draft is 3"),
        ({"most": 0}, "most is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        moecc.speculate(**arguments)


def test_what_it_cannot_generate_is_refused() -> None:
    model = adopted("qwen3_moe")
    refused: tuple[dict[str, Any], ...] = ({"num_beams": 2}, {"use_cache": False})
    for ids, how in ((IDS.repeat(2, 1), SETTINGS), *((IDS, SETTINGS | one) for one in refused)):
        with pytest.raises(InputError):
            model.generate(ids, custom_generate=moecc.speculate(), **how)
    plain = tiny()
    with pytest.raises(InputError, match=r"moecc\.load"):
        plain.generate(IDS, custom_generate=moecc.speculate(), **SETTINGS)
