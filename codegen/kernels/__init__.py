"""Hold the Triton kernels: one kernel (or one family that runs together) a file, nothing else.

Importing a module here imports triton. What all kernels share:

- H, I and E are compile-time constants (`HIDDEN`, `INTERMEDIATE`, `EXPERTS`); T and K never are.
- Tensors are contiguous; the weights' layout is two compile-time strides, or packed (`low_bit`).
- Weights lie at their expert's id, or where a table says (`choices.locate`). Biases lie at the id.
- An assignment is one (token, k) pair, numbered `token * K + k`. Offsets into hidden states and
  weights are 64-bit.
- Products accumulate in float32. An assignment whose expert is outside 0..E-1 contributes nothing.
"""
