"""Have what drafts compute with: the cache, or low-bit copies as long as they pay."""

import time
from collections.abc import Sequence

from moecc.runtime.rent import Rent
from moecc.runtime.schemes.scheme import SCHEMES
from moecc.runtime.watch import Use
from moecc.speculation.cached import CACHED, draft_on_cached
from moecc.speculation.copies import add_copies, price_of, remove_copies
from moecc.speculation.known import Speculation


class Holding:
    """What one generation may draft with; another model, or the prompt, needs nothing."""

    def __init__(self, about: Speculation, uses: Sequence[Use], k: int | None) -> None:
        """Make copies, or where they cost slots and `k` is None, prepare to.

        Raises what `add_copies` raises.
        """
        self._about, self._uses = about, uses
        self._scheme = SCHEMES.get(about.source)
        if about.source == CACHED:
            draft_on_cached(about.twins, uses)
        if self._scheme is None or k == 0:
            return
        if k is None and about.rent is None:
            price = price_of(about.twins, uses, self._scheme)
            about.rent = Rent(price=price) if price else None
        if k is not None or about.rent is None:
            self._add()
            about.rent = None  # whoever fixes a depth keeps the copies

    def is_ready(self) -> bool:
        """Tell whether "auto" can draft now, once copies came or went as they are worth."""
        rent = self._about.rent
        if rent is not None and rent.held and not rent.pays(self._about.depth.best_rate()):
            self._about.copied -= remove_copies(self._about.twins)
            rent.held = False
        elif rent is not None and rent.is_affordable():
            began = time.perf_counter()
            self._add()
            rent.take(time.perf_counter() - began)
            self._about.depth.credit += rent.price  # what is set aside for drafts that lose
        return rent is None or rent.held

    def _add(self) -> None:
        assert self._scheme is not None
        self._about.copied += add_copies(self._about.twins, self._uses, self._scheme)
