"""Formats of checkpoints whose weights are codes, one a file."""
