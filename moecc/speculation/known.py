"""Remember what drafts have done for each model, for the governor and for reports."""

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moecc.runtime.depth import Depth
from moecc.runtime.rent import Rent
from moecc.runtime.twins import Twins


@dataclass(slots=True, kw_only=True)
class Speculation:
    """What one source of drafts has done for one model."""

    source: str
    depth: Depth
    twins: Twins = field(default_factory=Twins)
    rent: Rent | None = None
    """Of copies that took slots of a cache, and come and go; None where they stay."""
    copied: int = 0
    """Bytes of low-bit copies."""
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    """Of the drafted tokens, those that stayed."""
    tokens: int = 0
    """All that were generated after the first."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Passes without drafts among them."""

    def count(self, drafted: int, kept: int, draft: float, verify: float) -> None:
        """Take note of a cycle, times in seconds."""
        accepted = kept - 1  # the last is the model's own
        self.cycles += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += kept
        self.draft_seconds += draft
        self.verify_seconds += verify
        if self.rent is not None:
            self.rent.observe(kept, draft + verify)
        if self.rent is None or self.rent.held:
            self.depth.observe(drafted, accepted, draft, verify)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values; `depths` has what each depth would give by the times so far."""
        depth = self.depth
        depths = [
            {"k": k, "tokens": tokens, "draft": draft, "verify": verify}
            | {"seconds": draft + verify, "rate": tokens / (draft + verify)}
            for k, tokens, draft, verify in depth.table()
        ]
        return {
            "source": self.source,
            "copied_bytes": self.copied,
            "copies": None
            if self.rent is None
            else {"held": self.rent.held, "made": self.rent.tries, "price": self.rent.price}
            | {"plain": self.rent.plain},
            "calls_without_copy": self.twins.missing,
            "cycles": self.cycles,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens": self.tokens,
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
            "chances": list(depth.chances),
            "k": depth.current,
            "depths": depths,
        }


def known(model: nn.Module, draft: Any, most: int) -> Speculation:
    """Give what is known of a source of drafts for a model."""
    key = draft if isinstance(draft, str) else id(draft), most
    name = draft if isinstance(draft, str) else type(draft).__name__
    mine = _known.setdefault(model, {})
    return mine.setdefault(key, Speculation(source=name, depth=Depth(most=most)))


def speculations(model: nn.Module) -> tuple[Speculation, ...]:
    """List what has been done for a model."""
    return tuple(_known.get(model, {}).values())


_known: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Speculation]]" = weakref.WeakKeyDictionary()
