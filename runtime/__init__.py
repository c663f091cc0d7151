"""What runs: the operators of rewritten graphs, their kernels and counters."""
