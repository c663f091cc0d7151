"""Train the small mixture of experts that ships in `benchmarks/reference`.

    apt-get install bible-kjv r-cran-janeaustenr
    python -m benchmarks.train_reference --minutes 70 --out benchmarks/reference
    python -m benchmarks.train_reference --family mixtral --minutes 18 --out FOLDER

The second is the other architecture that `benchmarks.quality` measures: few and wide experts.

Three kinds of text give the experts something to specialise in: prose (Jane Austen's novels),
verse (the King James Bible) and code (Python's standard library). Nothing is downloaded. Training
runs in float32 on the CPU. On glibc `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000` makes a
step about 20 % faster, as big buffers are reused; on a busy machine `OMP_NUM_THREADS=1` does more
in all than two threads that wait for each other.
"""

import argparse
import math
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.perplexity import find_texts, print_losses

END = "<|endoftext|>"
VOCABULARY = 2048
HELD_OUT = 40  # one document in 40 is kept for validation
BATCH = 3072  # tokens per step
BALANCE = 0.01  # weight of the load-balancing loss
PEAK = 3e-3  # learning rate after warm-up
LONGEST_STEP = 5.0  # seconds; a step that took longer was paused, and counts as this much
SAVE_EVERY = 240.0  # seconds of training between checkpoints

AUSTEN = """for (book in c("sensesensibility", "prideprejudice", "mansfieldpark", "emma",
"northangerabbey", "persuasion")) writeLines(getExportedValue("janeaustenr", book))"""


def ask(program: list[str], package: str) -> str:
    """Return what `program` prints, or say which Debian package provides its text."""
    try:
        return subprocess.run(program, check=True, capture_output=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise SystemExit(
            f"no training text from '{program[0]}': {detail}\n"
            f"install it with 'apt-get install {package}' and run again"
        ) from error


def read_prose() -> list[str]:
    """Return the chapters of Jane Austen's six novels, one line a paragraph."""
    text = ask(["Rscript", "-e", AUSTEN], "r-cran-janeaustenr").replace("_", "")
    chapters = re.split(r"^chapter [ivxlc\d]+\.?$", text, flags=re.MULTILINE | re.IGNORECASE)
    paragraphs = ([" ".join(p.split()) for p in re.split(r"\n\s*\n", c)] for c in chapters)
    return ["\n\n".join(p for p in chapter if p) + "\n" for chapter in paragraphs]


def read_verse() -> list[str]:
    """Return the chapters of the King James Bible, one line a verse."""
    text = ask(["bible", "-f", "ge1:1-re22:21"], "bible-kjv")
    chapters: dict[tuple[str, str], list[str]] = {}
    for book, chapter, verse in re.findall(r"^(\d?[A-Za-z]+)(\d+):(\d+ .*)$", text, re.MULTILINE):
        chapters.setdefault((book, chapter), []).append(f"{chapter}:{verse.rstrip()}\n")
    return ["".join(verses) for verses in chapters.values()]


def read_code() -> list[str]:
    """Return the top-level modules of the standard library that runs this script."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [m.read_text(encoding="utf-8") for m in modules if "sysconfigdata" not in m.name]


def write_corpus(validation: Path) -> list[str]:
    """Read every kind, write its held-out documents to `validation`, return the others."""
    validation.mkdir(parents=True, exist_ok=True)
    training = []
    for kind, read in {"prose": read_prose, "verse": read_verse, "code": read_code}.items():
        documents = read()
        held_out = documents[HELD_OUT // 2 :: HELD_OUT]
        (validation / f"{kind}.txt").write_text("\n".join(held_out), encoding="utf-8")
        training += [d for i, d in enumerate(documents) if i % HELD_OUT != HELD_OUT // 2]
        print(f"{kind}: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB")
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():  # of the held-out code
        shutil.copy(licence, validation / "LICENSE-python")
    return training


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, which gives back every text exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, model_max_length=512)


Model = Qwen3MoeForCausalLM | MixtralForCausalLM


def make_model(family: str) -> Model:
    """Build the untrained model of a family."""
    model = {"qwen3_moe": make_qwen3, "mixtral": make_mixtral}[family]()
    model.set_experts_implementation("sorted")
    return model


def make_mixtral() -> MixtralForCausalLM:
    """Build 2.2 million parameters, 0.8 million of them used per token."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=BALANCE,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def make_qwen3() -> Qwen3MoeForCausalLM:
    """Build 6.3 million parameters, 1.7 million of them used per token."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


class SortedExperts(torch.autograd.Function):
    """Run each expert once, on its own rows: x [T,H], index and weight [T,K] → [T,H].

    One expert's rows stay in the cache from its first product to its last, and the gradient of the
    gather is a gather through the inverse permutation: no scatter anywhere.
    """

    @staticmethod
    def forward(ctx, x, gate_up, down, index, weight):
        """Sort the T·K assignments by expert, run the experts, add up in token order."""
        order = index.flatten().argsort(stable=True)
        place = order.argsort()
        token = order // index.shape[1]
        ends = torch.bincount(index.flatten(), minlength=len(down)).cumsum(0).tolist()
        ctx.spans = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        scale = weight.flatten()[order].unsqueeze(1)
        rows = x.index_select(0, token)
        hidden = x.new_empty(len(rows), gate_up.shape[1])
        out = torch.empty_like(rows)
        for e, span in enumerate(ctx.spans):
            torch.mm(rows[span], gate_up[e].T, out=hidden[span])
            gate, up = hidden[span].chunk(2, -1)
            torch.mm(F.silu(gate).mul_(up).mul_(scale[span]), down[e].T, out=out[span])
        ctx.save_for_backward(rows, hidden, scale, token, place, gate_up, down)
        return out.index_select(0, place).view(*index.shape, -1).sum(1)

    @staticmethod
    def backward(ctx, grad):
        """Send the gradient back through the experts, with the same spans."""
        rows, hidden, scale, token, place, gate_up, down = ctx.saved_tensors
        grad_out = grad.index_select(0, token)
        grad_rows, grad_scale = torch.empty_like(rows), torch.empty_like(scale)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, span in enumerate(ctx.spans):
            gate, up = hidden[span].chunk(2, -1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            inner = silu * up
            torch.mm(grad_out[span].T, inner * scale[span], out=grad_down[e])
            grad_inner = grad_out[span] @ down[e]
            torch.sum(grad_inner * inner, 1, keepdim=True, out=grad_scale[span])
            grad_inner *= scale[span]
            slope = sigmoid + silu * (1 - sigmoid)  # of silu
            both = torch.cat([grad_inner * up * slope, grad_inner * silu], 1)
            torch.mm(both.T, rows[span], out=grad_gate_up[e])
            torch.mm(both, gate_up[e], out=grad_rows[span])
        grad_x = grad_rows.index_select(0, place).view(len(grad), -1, rows.shape[1]).sum(1)
        return grad_x, grad_gate_up, grad_down, None, grad_scale[place].view(len(grad), -1)


ALL_EXPERTS_FUNCTIONS.register(
    "sorted",
    lambda experts, x, index, weight: SortedExperts.apply(
        x, experts.gate_up_proj, experts.down_proj, index, weight
    ),
)


def measure_balance(router_logits: torch.Tensor, active: int) -> torch.Tensor:
    """Return the Switch load-balancing loss of one layer; 1 when every expert is equally used."""
    chosen = router_logits.topk(active, -1).indices.flatten()
    share = torch.bincount(chosen, minlength=router_logits.shape[1]) / len(chosen)
    return router_logits.shape[1] * (share * router_logits.softmax(-1).mean(0)).sum()


def compute_loss(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the language loss and the mean balance loss of `ids` [rows, length + 1]."""
    body = model.model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(body.last_hidden_state)
    active = model.config.num_experts_per_tok
    balance = torch.stack([measure_balance(layer, active) for layer in body.router_logits]).mean()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), balance


def schedule(done: float) -> tuple[float, int]:
    """Return the learning rate and the window for the fraction `done` of the time."""
    warm, cosine = min(1.0, done / 0.02), 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))
    return PEAK * warm * (0.02 + 0.98 * cosine), 256 if done < 0.85 else 512


def draw_windows(ids: torch.Tensor, window: int) -> torch.Tensor:
    """Draw windows of `window` + 1 tokens anywhere in the stream `ids`, BATCH tokens in all."""
    starts = torch.randint(len(ids) - window, (BATCH // window, 1))
    return ids[starts + torch.arange(window + 1)].long()


def train(model: Model, ids: torch.Tensor, budget: float, save: Path, resume: bool) -> None:
    """Train for `budget` seconds of steps, saving to `save` now and then."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    step, tokens, spent = 0, 0, 0.0
    if resume:
        state = torch.load(save)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, spent = state["progress"]
        torch.manual_seed(step)
    saved = spent
    while spent < budget:
        start = time.perf_counter()
        rate, window = schedule(spent / budget)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, balance = compute_loss(model, draw_windows(ids, window))
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + BATCH
        spent += min(time.perf_counter() - start, LONGEST_STEP)
        if step % 50 == 0:
            print(
                f"step {step}  {spent / 60:.1f} min  {tokens / 1e6:.1f}M tokens  "
                f"loss {loss.item():.3f}  balance {balance.item():.3f}  rate {rate:.1e}",
                flush=True,
            )
        if spent - saved > SAVE_EVERY or spent >= budget:
            saved, progress = spent, (step, tokens, spent)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "progress": progress}, save)
    print(f"trained {step} steps, {tokens} tokens, {spent / 60:.1f} minutes")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Iterator[torch.Tensor]:
    """Yield the ids of each document, with the end token after it."""
    for ids in tokenizer(documents, verbose=False).input_ids:
        yield torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int32)


def main() -> None:
    """Gather the text, train the tokenizer and the model, write the checkpoint and measure it."""
    parser = argparse.ArgumentParser(description="Train the reference mixture of experts.")
    parser.add_argument("--family", choices=("qwen3_moe", "mixtral"), default="qwen3_moe")
    parser.add_argument("--minutes", type=float, default=70, help="time to train for [70]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    torch.manual_seed(0)
    documents = write_corpus(args.out / "validation")
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(args.out)
    ids = torch.cat(list(encode(tokenizer, documents)))
    print(f"{len(ids)} training tokens")
    model = make_model(args.family)
    save = Path(tempfile.gettempdir()) / f"moecc-{args.family}.pt"
    train(model, ids, args.minutes * 60, save, args.resume)
    model.to(torch.bfloat16).save_pretrained(args.out)
    print_losses(model.float().eval(), tokenizer, find_texts(str(args.out)))


if __name__ == "__main__":
    main()
