"""Experts spread over the ranks of a torch.distributed group."""
