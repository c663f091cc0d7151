"""Lay out a token and its choices as one row of bytes, so that one message carries them."""

import torch


def pack_rows(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Give [n, H], ids [n, K] and weights [n, K] as uint8 [n, bytes]; ids travel as int32."""
    parts = (hidden, ids.to(torch.int32), weights)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_rows(
    rows: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo `pack_rows`; the tensors say which dtypes and widths there were."""
    kinds = [(one.shape[1], one.dtype) for one in (hidden, ids, weights)]
    kinds[1] = (kinds[1][0], torch.int32)
    sizes = [width * dtype.itemsize for width, dtype in kinds]
    parts = rows.split(sizes, dim=1)
    found = [part.contiguous().view(dtype) for part, (_, dtype) in zip(parts, kinds, strict=True)]
    return found[0], found[1].to(ids.dtype), found[2]
