"""Experts that are not all in memory: where their bytes are, and which of them are in slots."""
