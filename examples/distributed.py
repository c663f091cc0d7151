"""Generate text with experts shared among processes: each reads and computes its own part.

torchrun --nproc-per-node 2 examples/distributed.py benchmarks/reference "In the beginning"
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import moecc

path, prompt = sys.argv[1:] or ("benchmarks/reference", "In the beginning")
dist.init_process_group("gloo")

# All ranks run the same tokens, so that each prints the same text; rank 0 does.
model = moecc.load(path, dtype=torch.float32, expert_parallel=dist.get_world_size())
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    moecc.balance(model)  # between two requests
    again = model.generate(**inputs, max_new_tokens=64, do_sample=False)
if dist.get_rank() == 0:
    print(tokenizer.decode(answer[0]))
    print("the same text after balancing:", torch.equal(answer, again))
    print(moecc.report(model))
dist.destroy_process_group()
