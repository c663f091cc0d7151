"""Checkpoints: where the experts of a model lie in its files, and how to load a model without."""
