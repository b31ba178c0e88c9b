"""Which blocks of prompts are live, or on their way: what is in use is neither fetched nor computed twice. No tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.block import Provenance

from .pages import Pages


@dataclass(frozen=True, slots=True)
class LiveBlock:
    """A page that holds one whole block of a prompt, and how good the K and V up to its end are."""

    page: int
    provenance: Provenance


class LivePrefixes:
    """Blocks by key, with the requests that hold them. All methods may be called from any thread.

    Parameters
    ----------
    pages : Pages
        In which `begin` takes hold of what it finds.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self._live: dict[bytes, dict[str, LiveBlock]] = {}
        #: Key -> the request that will have the block first.
        self._coming: dict[bytes, str] = {}
        self._keys: dict[str, Sequence[bytes]] = {}
        #: Called, from any thread, when blocks have come or will not come any more.
        self.on_progress: Callable[[], None] = lambda: None

    def begin(self, owner: str, keys: Sequence[bytes], usable: int, max_distortion: float) -> list[LiveBlock] | None:
        """Announce a request's blocks, and find which of them are live.

        Parameters
        ----------
        keys : sequence of bytes
            Of all whole blocks of its prompt.
        usable : int
            How many of them it may take from others.
        max_distortion : float
            Blocks that are worse are not taken; 0 takes any.

        Returns
        -------
        list of LiveBlock or None
            The leading live blocks, with hold taken of their pages; None, and nothing is announced, while the block after them is
            on its way in another request: ask again later.
        """
        with self._lock:
            found: list[LiveBlock] = []
            for key in keys[:usable]:
                block = next(iter(self._live.get(key, {}).values()), None)
                if block is None or not _good_enough(block.provenance, max_distortion):
                    if block is None and key in self._coming:
                        return None
                    break
                found.append(block)
            self._pages.share([block.page for block in found])
            self._keys[owner] = keys
            for key, block in zip(keys, found, strict=False):
                self._live[key][owner] = block
            for key in keys[len(found) :]:
                self._coming.setdefault(key, owner)
            return found

    def came(self, owner: str, first: int, blocks: Sequence[LiveBlock]) -> None:
        """The request has its blocks from number `first` on."""
        with self._lock:
            for key, block in zip(self._keys.get(owner, ())[first:], blocks, strict=False):
                self._live.setdefault(key, {})[owner] = block
                self._coming.pop(key, None)
        self.on_progress()

    def end(self, owner: str) -> None:
        """The request is about to give its pages back, or to change them. Unknown ones are ignored."""
        self.withdraw(owner)
        self.on_progress()

    def withdraw(self, owner: str) -> None:
        """As `end`, for one that has only just begun: nobody need hear of it."""
        with self._lock:
            for key in self._keys.pop(owner, ()):
                holders = self._live.get(key, {})
                holders.pop(owner, None)
                if not holders:
                    self._live.pop(key, None)
                if self._coming.get(key) == owner:
                    del self._coming[key]


def _good_enough(provenance: Provenance, bound: float) -> bool:
    return bound <= 0 or max(provenance.distortion.keys, provenance.distortion.values) <= bound
