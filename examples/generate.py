"""Generate text through moecc: the shortest program that does.

python examples/generate.py benchmarks/reference "In the beginning"
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import moecc

path, prompt = sys.argv[1:] or ("benchmarks/reference", "In the beginning")
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)

# generate() calls model.forward, in prefill and in decode.
model.forward = torch.compile(model.forward, backend="moecc", dynamic=True)

inputs = tokenizer(prompt, return_tensors="pt")
model.generate(**inputs, max_new_tokens=64, do_sample=False, streamer=TextStreamer(tokenizer))
print(moecc.report(model))
