"""The block table: what a node holds, and where in its arena. Mutated by the event loop alone."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from kvstore.arena.pages import AccountingError, Extent
from kvstore.block import BlockHeader, LayerInfo
from kvstore.eviction.base import BlockInfo
from kvstore.identity import NO_PARENT, digest


def pages_of(size_bytes: int, page_bytes: int) -> int:
    """Whole pages that hold `size_bytes`."""
    return -(-size_bytes // page_bytes)


def pages_in(layers: Iterable[tuple[Extent, ...]]) -> int:
    """Pages that layers have in all."""
    pages = 0
    for extents in layers:
        for extent in extents:
            pages += extent.count
    return pages


def layer_pages(header: BlockHeader, page_bytes: int) -> list[int]:
    """Whole pages for each present layer."""
    return [pages_of(row.size_bytes, page_bytes) for row in header.rows[: header.present]]


def block_id(owner: str, key: bytes) -> bytes:
    """The name of a block inside a node: its key, or for an owner with a credential a digest of both.

    So two owners may hold blocks of one key without either learning of the other's, and no key that one owner can choose is another's.
    """
    return digest(b"concertina-owned-block", owner.encode(), key) if owner else key


def block_info(header: BlockHeader, page_bytes: int, owner: str = "", least: int = 1) -> BlockInfo:
    """The block as an eviction policy sees it: rung 0 is all that is present now, each further rung one layer less, down to `least`."""
    parent = None if header.parent == NO_PARENT else block_id(owner, header.parent)
    id, depth = block_id(owner, header.key), header.start // header.tokens
    if header.present == 1:
        row = header.rows[0]
        return BlockInfo(id, parent, depth, *_one_rung(pages_of(row.size_bytes, page_bytes) * page_bytes, _loss(row, row)))
    sizes, losses, total = [], [], 0
    for fidelity, row in enumerate(header.rows[: header.present], 1):
        total += pages_of(row.size_bytes, page_bytes) * page_bytes
        if fidelity >= least:
            sizes.append(total)
            losses.append(_loss(row, header.rows[header.present - 1]))
    return BlockInfo(id, parent, depth, tuple(reversed(sizes)), tuple(reversed(losses)))


@lru_cache(maxsize=1024)
def _one_rung(size: int, loss: float) -> tuple[tuple[int], tuple[float]]:
    """Sizes and losses of a block without a ladder: the same two objects for blocks of one size, so that a policy knows them again."""
    return (size,), (loss,)


def _loss(row: LayerInfo, full: LayerInfo) -> float:
    """Share of quality lost at `row` against `full`.

    With a known divergence d (nats a token), ``1 - exp(-(d_row - d_full))``: the geometric mean of the probability that the model
    takes away from the right token. Without one, the added relative squared error stands in.
    """
    if row.expected_divergence > 0:
        harm = row.expected_divergence - full.expected_divergence
    else:
        harm = max(row.distortion.keys - full.distortion.keys, row.distortion.values - full.distortion.values)
    return 1.0 - math.exp(-max(0.0, harm)) if math.isfinite(harm) else 1.0


@dataclass(slots=True, eq=False)
class Entry:
    """A resident block.

    Parameters
    ----------
    header : BlockHeader
        Kept in host memory; `header.present` layers are here.
    layers : list of tuple of Extent
        The pages of each present layer, base first.
    top : int
        Layers present when it was stored; rung r of the policy is fidelity ``top - r``.
    generation : int
        Unique for each state of each block's bytes: a reader that sees another number than at its start has lost the block.
    last_use : float
        Clock seconds.
    info : BlockInfo
        The block as it was stored, for the policy.
    owner : str
        Tenant whose credential stored it; empty where credentials are not asked for.
    holds : int
        Leases and pins on it; while there are any it is neither dropped, demoted nor replaced.
    description : tuple of (int, bytes)
        What the door says of it, header and places, and the generation of which that is true: made once the door has taken it, or by
        the first read.
    """

    header: BlockHeader
    layers: list[tuple[Extent, ...]]
    top: int
    generation: int
    last_use: float
    info: BlockInfo
    owner: str = ""
    holds: int = 0
    description: tuple[int, bytes] = (0, b"")
    pages: int = field(init=False)

    def __post_init__(self) -> None:
        self.pages = pages_in(self.layers)

    @property
    def first_page(self) -> int:
        """0 for a block without pages."""
        for extents in self.layers:
            if extents:
                return extents[0].start
        return 0

    @property
    def key(self) -> bytes:
        return self.header.key

    @property
    def id(self) -> bytes:
        """Its name inside the node, see `block_id`."""
        return self.info.id  # type: ignore[return-value]


class Aliases:
    """Ids under a key other than the key itself: one for each owner that holds a block of it."""

    def __init__(self) -> None:
        self._ids: dict[bytes, set[bytes]] = {}

    def of(self, key: bytes) -> tuple[bytes, ...]:
        return tuple(self._ids.get(key, ()))

    def add(self, key: bytes, id: bytes) -> None:
        if id != key:
            self._ids.setdefault(key, set()).add(id)

    def discard(self, key: bytes, id: bytes) -> None:
        ids = self._ids.get(key, set())
        ids.discard(id)
        if not ids:
            self._ids.pop(key, None)


class BlockTable:
    """Entries by id, with the sums that the account and the metrics report.

    Parameters
    ----------
    marks : memoryview, optional
        A number a page (`Arena.marks`). That of a block's first page is its generation, from before anybody is told of the block until
        before its bytes change.
    """

    def __init__(self, marks: memoryview | None = None) -> None:
        self._marks = marks
        self._entries: dict[bytes, Entry] = {}
        self._aliases = Aliases()
        self._generations = itertools.count(1)
        self.pages = 0
        self.raw_bytes = 0
        self.by_fidelity: Counter[int] = Counter()
        self.stored_by_codec: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, id: bytes) -> Entry | None:
        return self._entries.get(id)

    def named(self, key: bytes) -> list[Entry]:
        """Every entry of this key, whoever owns it."""
        return [self._entries[id] for id in (key, *self._aliases.of(key)) if id in self._entries]

    def insert(self, header: BlockHeader, layers: list[tuple[Extent, ...]], now: float, info: BlockInfo, owner: str = "") -> Entry:
        """Add a block whose id is not resident; `info` is what the policy was or will be told of it."""
        entry = Entry(header, layers, header.present, next(self._generations), now, info, owner)
        self._mark(entry, entry.generation)
        self._entries[entry.id] = entry
        self._aliases.add(header.key, entry.id)
        self.raw_bytes += header.raw_bytes
        self._count(entry, 1)
        return entry

    def remove(self, entry: Entry) -> list[Extent]:
        """Take a block out. Returns its pages, which are the caller's to free."""
        del self._entries[entry.id]
        self._aliases.discard(entry.key, entry.id)
        self.raw_bytes -= entry.header.raw_bytes
        self._count(entry, -1)
        entry.generation = 0
        self._mark(entry, 0)
        return [extent for layer in entry.layers for extent in layer]

    def truncate(self, entry: Entry, fidelity: int) -> list[Extent]:
        """Drop the layers above `fidelity`. Returns their pages, which are the caller's to free."""
        header = entry.header.truncate(fidelity)  # raises before anything has changed
        self._count(entry, -1)
        self._mark(entry, 0)
        dropped = [extent for layer in entry.layers[fidelity:] for extent in layer]
        del entry.layers[fidelity:]
        entry.header = header
        entry.pages -= sum(extent.count for extent in dropped)
        entry.generation = next(self._generations)
        self._mark(entry, entry.generation)
        self._count(entry, 1)
        return dropped

    def page(self, after: bytes, limit: int, owner: str | None = None) -> list[Entry]:
        """The `limit` entries with the smallest ids above `after`, in their order, of `owner` alone unless it is None; O(n log limit)."""
        ids = (id for id, entry in self._entries.items() if id > after and owner in (None, entry.owner))
        return [self._entries[id] for id in heapq.nsmallest(limit, ids)]

    def check(self, holds: int) -> None:
        """Verify the sum of pages, and that blocks are held `holds` times in all. Raises AccountingError."""
        pages, held = sum(entry.pages for entry in self), sum(entry.holds for entry in self)
        if pages != self.pages:
            raise AccountingError(f"blocks hold {pages} pages, the sum says {self.pages}")
        if held != holds:
            raise AccountingError(f"blocks are held {held} times, leases, pins and writers account for {holds}")

    def _mark(self, entry: Entry, generation: int) -> None:
        if self._marks is not None and entry.pages:
            self._marks[entry.first_page] = generation

    def _count(self, entry: Entry, sign: int) -> None:
        header = entry.header
        self.pages += sign * entry.pages
        self.by_fidelity[header.present] += sign
        self.stored_by_codec[header.codec] += sign * header.total_bytes
