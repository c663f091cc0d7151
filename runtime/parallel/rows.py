"""Lay out tokens and their choices as rows of bytes, so that one message carries them."""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Tokens and what they chose."""

    hidden: torch.Tensor
    """[n, H]."""
    ids: torch.Tensor
    """[n, K]; an id that is no expert, or one for others to compute, gives nothing."""
    weights: torch.Tensor
    """[n, K]."""

    @property
    def size(self) -> int:
        """Bytes of a row; ids travel as int32."""
        hidden, ids, weights = self
        return (
            hidden.shape[1] * hidden.itemsize
            + ids.shape[1] * 4
            + weights.shape[1] * weights.itemsize
        )

    def of(self, tokens: torch.Tensor) -> "Rows":
        """Select rows by their numbers, int64 [m]."""
        return Rows(*(part[tokens] for part in self))

    def up_to(self, length: int) -> "Rows":
        """Add rows that choose no expert."""
        missing = length - len(self.hidden)
        values = (0, -1, 0)
        added = (
            part.new_full((missing, part.shape[1]), value)
            for part, value in zip(self, values, strict=True)
        )
        return Rows(*(torch.cat(pair) for pair in zip(self, added, strict=True)))

    def pack(self) -> torch.Tensor:
        """Give them as uint8 [n, size]."""
        parts = (self.hidden, self.ids.to(torch.int32), self.weights)
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def unpack(self, packed: torch.Tensor) -> "Rows":
        """See what others packed, uint8 [m, size], whose rows are like these."""
        kinds = (self.hidden.dtype, torch.int32, self.weights.dtype)
        sizes = [part.shape[1] * kind.itemsize for part, kind in zip(self, kinds, strict=True)]
        parts = zip(torch.split(packed, sizes, dim=1), kinds, strict=True)
        hidden, ids, weights = (part.contiguous().view(kind) for part, kind in parts)
        return Rows(hidden, ids.to(self.ids.dtype), weights)
