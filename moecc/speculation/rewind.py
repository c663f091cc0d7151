"""Take tokens back out of a transformers cache of keys and values.

Drafted tokens leave keys and values behind that the verification writes anew, and a refused token
leaves some that are wrong. Caches that grow can be cropped. Static ones are written in place: their
full layers count the tokens that are valid, and their sliding windows move, so that what they held
is kept until it is known how many tokens stay.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from moecc.runtime.errors import InputError


class Rewinder:
    """A cache whose latest tokens can be taken back."""

    def __init__(self, cache: Any) -> None:
        """Prepare a cache after its prefill.

        Raises `InputError` for caches that keep a state instead of tokens.
        """
        if not isinstance(cache, Cache):
            raise InputError(f"speculation needs a transformers Cache, not {type(cache).__name__}")
        self._cache = cache
        self._static: list[Any] = [one for one in cache.layers if isinstance(one, StaticLayer)]
        if not self._static and not cache.is_croppable:
            raise InputError(
                f"a {type(cache).__name__} of this model keeps a state that tokens cannot be taken "
                "back from, so drafts cannot be refused; generate without speculation"
            )
        if self._static and len(self._static) < len(cache.layers):
            raise InputError("speculation takes no cache that is static in a part of its layers")
        cache.activate_past_recording()
        self._marks: list[_Mark] = []
        windows = [one for one in self._static if isinstance(one, StaticSlidingWindowLayer)]
        self.most = min((one.max_cache_len for one in windows), default=sys.maxsize) - 1
        """Tokens of a draft: a window has to hold it, and one more."""

    def mark(self) -> None:
        """Remember what comes next, so that some of it can be taken back."""
        self._marks = [_Mark.of(layer) for layer in self._static]

    def take_back(self, count: int, since: int) -> None:
        """Take the last `count` of the `since` tokens since the mark back."""
        if count == 0:
            return
        if not self._static:
            self._cache.crop(-count)
        for layer, mark in zip(self._static, self._marks, strict=True):
            mark.restore(layer, count, since)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """What a static layer held."""

    length: int
    window: tuple[torch.Tensor, torch.Tensor] | None
    """Keys and values of a sliding window, which moves when it is full."""

    @staticmethod
    def of(layer: Any) -> "_Mark":
        if not layer.is_sliding:
            return _Mark(length=int(layer.cumulative_length), window=None)
        window: tuple[Any, Any] = layer.keys.clone(), layer.values.clone()
        return _Mark(length=layer.cumulative_length_int, window=window)

    def restore(self, layer: Any, count: int, since: int) -> None:
        """Write what was there, and after it the tokens that stay."""
        if self.window is None:
            layer.cumulative_length.fill_(self.length + since - count)
            return
        end = min(self.length + since, layer.max_cache_len)
        stay = slice(end - since, end - count)
        kept = layer.keys[:, :, stay].clone(), layer.values[:, :, stay].clone()
        layer.keys.copy_(self.window[0])
        layer.values.copy_(self.window[1])
        layer.cumulative_length_int = self.length
        layer.cumulative_length.fill_(min(self.length, layer.max_cache_len))
        if since > count:
            layer.update(*kept)
