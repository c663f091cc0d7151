"""What to emit: a `KernelSpec`, the emitters and the choice between them."""
