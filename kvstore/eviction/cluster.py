"""One order of value over many nodes: what a node publishes, and what every node and client derives from it (DESIGN §8).

A node publishes its `Pressure`: free bytes, and its bytes by value on a logarithmic scale. From the last report of every node each
party derives the same *waterline*, the value of the bytes that leave next anywhere. New blocks go where the least valuable bytes are;
what is worth less than the waterline is not worth writing. Reports are up to a second old, so a party that places blocks debits
what it has placed since (`Pressure.take`), else all would choose the same node until the next report.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidInputError
from .base import BlockId

#: Bins an octave of value, and the octave of the lowest bin. Value is in uses per second.
_PER_OCTAVE = 4
_LOWEST_OCTAVE = -24
BINS = 128
_HEADER = struct.Struct("<4sHHQQ")
_MAGIC = b"CPR1"


def bin_of(value: float) -> int:
    """Bin of a value; everything below the scale is in the first one, above it in the last."""
    if value <= 0.0:
        return 0
    if value == math.inf:
        return BINS - 1
    return min(max(math.ceil((math.log2(value) - _LOWEST_OCTAVE) * _PER_OCTAVE), 0), BINS - 1)


def value_of(bin_: int) -> float:
    """Upper edge of a bin."""
    return 2.0 ** (bin_ / _PER_OCTAVE + _LOWEST_OCTAVE)


_VALUES = tuple(value_of(bin_) for bin_ in range(BINS))


@dataclass(slots=True)
class Pressure:
    """A node's published summary.

    Parameters
    ----------
    free_bytes : int
        Bytes that can be written before anything has to leave.
    total_bytes : int
        Size of the arena.
    bytes_by_value : sequence of int
        Bytes that stand at each bin of value, `BINS` numbers; the cheapest leave first.
    """

    free_bytes: int
    total_bytes: int
    bytes_by_value: list[int]

    @classmethod
    def of(cls, free_bytes: int, total_bytes: int, values: np.ndarray, sizes: np.ndarray) -> Pressure:
        """From the value and the bytes of each block (or of a sample, scaled up to the bytes in use).

        Parameters
        ----------
        values, sizes : arrays [blocks], float
            As `EvictionPolicy.census` gives them; `sizes` may be in any unit.
        """
        used_bytes = total_bytes - free_bytes
        with np.errstate(divide="ignore"):
            bins = np.ceil((np.log2(np.maximum(values, 0.0)) - _LOWEST_OCTAVE) * _PER_OCTAVE)
        bins = np.clip(bins, 0, BINS - 1).astype(np.int64)
        share = np.bincount(bins, sizes, BINS)
        if not share.any():
            share[0] = 1.0  # a policy that has no value for its blocks
        scale = used_bytes / share.sum()
        return cls(free_bytes, total_bytes, (share * scale).astype(np.int64).tolist())

    def price(self, size_bytes: int) -> float:
        """Mean value of the bytes that would leave for `size_bytes` more, free ones at 0; infinite where there are not so many."""
        left, lost = size_bytes - self.free_bytes, 0.0
        if left <= 0:
            return 0.0
        for size, value in zip(self.bytes_by_value, _VALUES, strict=True):
            if size >= left:
                return (lost + left * value) / size_bytes
            if size:
                lost += size * value
                left -= size
        return math.inf

    def cheapest_bytes(self) -> int:
        """Bytes that are free, or else as cheap as the cheapest."""
        return self.free_bytes or next((size for size in self.bytes_by_value if size > 0), 0)

    def take(self, size_bytes: int) -> None:
        """Debit `size_bytes` that were placed on the node since its report: free bytes first, then the cheapest."""
        taken = min(self.free_bytes, size_bytes)
        self.free_bytes -= taken
        size_bytes -= taken
        for number, size in enumerate(self.bytes_by_value):
            if size_bytes <= 0:
                return
            taken = min(size, size_bytes)
            self.bytes_by_value[number] -= taken
            size_bytes -= taken

    def copy(self) -> Pressure:
        return Pressure(self.free_bytes, self.total_bytes, list(self.bytes_by_value))

    def to_bytes(self) -> bytes:
        """At most 24 + 8 x `BINS` bytes: a header, then pairs of bin (uint8) and bytes (uint64) for the bins that are not empty."""
        rows = [(number, size) for number, size in enumerate(self.bytes_by_value) if size > 0]
        body = b"".join(struct.pack("<BQ", *row) for row in rows)
        return _HEADER.pack(_MAGIC, BINS, len(rows), self.free_bytes, self.total_bytes) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Pressure:
        """Parse what `to_bytes` wrote.

        Raises
        ------
        InvalidInputError
            For anything else; the report is then to be ignored.
        """
        try:
            magic, bins, rows, free_bytes, total_bytes = _HEADER.unpack_from(data)
            if magic != _MAGIC or bins != BINS or rows > BINS or len(data) != _HEADER.size + 9 * rows or free_bytes > total_bytes:
                raise InvalidInputError("not a pressure report of this version")
            by_value = [0] * BINS
            for number, size in struct.iter_unpack("<BQ", data[_HEADER.size :]):
                by_value[number] = size
        except (struct.error, IndexError) as error:
            raise InvalidInputError(f"not a pressure report: {error}") from error
        return cls(free_bytes, total_bytes, by_value)

    def to_text(self) -> str:
        """`to_bytes` in base64, at most 1,600 characters."""
        return base64.b64encode(self.to_bytes()).decode()

    @classmethod
    def from_text(cls, text: str, free_bytes: int, total_bytes: int) -> Pressure:
        """What `to_text` wrote; of a node that gave no report that can be read: the room that it has, and all that it holds is precious."""
        try:
            return cls.from_bytes(base64.b64decode(text, validate=True))
        except (ValueError, InvalidInputError):
            return cls(free_bytes, total_bytes, [0] * (BINS - 1) + [total_bytes - free_bytes])


def waterline(reports: Sequence[Pressure], needed_bytes: int | None = None) -> float:
    """The value below which bytes anywhere leave first when `needed_bytes` are to come; 0.0 while there is room for them.

    Left out, it is a 64th of all arenas: about what comes between two reports, and more than the scraps that full nodes have free.
    """
    if needed_bytes is None:
        needed_bytes = sum(report.total_bytes for report in reports) // 64 + 1
    missing = needed_bytes - sum(report.free_bytes for report in reports)
    if missing <= 0:
        return 0.0
    for number in range(BINS):
        missing -= sum(report.bytes_by_value[number] for report in reports)
        if missing <= 0:
            return value_of(number)
    return math.inf


def is_admitted(worth: float, victim: float, line: float) -> bool:
    """Whether a block of this value (`EvictionPolicy.worth`) may be written to a node whose own next victim is worth `victim`.

    The next victim is the waterline as the node knows it now; that of the reports, `line`, says whether there is room elsewhere.
    Values are told apart as finely as reports tell them: a block that is worth as much as what leaves next is written.
    """
    return line <= 0.0 or bin_of(worth) >= bin_of(victim)


class Placer:
    """Chooses the node for new blocks: where bytes are worth least, by the last reports and what was placed since.

    A node that knows a block already learns more from its return than one that has never seen it, and a chain that is cut into
    pieces is lost below every cut. So a run of blocks goes to the first of these nodes where what leaves for it is worth at most so
    many times the least: the one that had it before, the one that holds its parent, the one on the writer's host; else to the least.

    Parameters
    ----------
    home : str or None
        The node on the writer's host.
    tolerance : three floats
        How many times the least those nodes' bytes may be worth, in that order.
    remember_blocks : int
        Blocks whose last node is remembered; the oldest are forgotten.
    """

    def __init__(
        self, home: str | None = None, tolerance: tuple[float, float, float] = (2.0, 1.5, 1.0), remember_blocks: int = 65_536
    ) -> None:
        self.home = home
        self.tolerance = tolerance
        self.remember_blocks = remember_blocks
        self._told: dict[str, Pressure] = {}
        self._reports: dict[str, Pressure] = {}
        self._before: OrderedDict[BlockId, str] = OrderedDict()

    def update(self, reports: Mapping[str, Pressure]) -> None:
        """Take the newest report of every living node; what was debited from an older report of a node is void."""
        for node in self._told.keys() - reports.keys():
            del self._reports[node]
        for node, report in reports.items():
            if self._told.get(node) is not report:
                self._reports[node] = report.copy()
        self._told = dict(reports)

    def last_place(self, id: BlockId) -> str | None:
        """The node that a block was last placed on, None if that is not remembered."""
        return self._before.get(id)

    def choose(self, ids: Sequence[BlockId], size_bytes: int, parent: str | None = None, coming_bytes: int = 0) -> str | None:
        """Node for the run of blocks `ids` of together `size_bytes`, None where no node is known.

        Parameters
        ----------
        parent : str or None
            Node that holds the parent of the first block.
        coming_bytes : int
            What is going to `follow` of the same run.
        """
        if not self._reports:
            return None
        prices = {node: report.price(size_bytes + coming_bytes) for node, report in self._reports.items()}
        chosen = min(prices, key=lambda node: (prices[node], -self._reports[node].cheapest_bytes(), node))
        least = prices[chosen]
        for node, tolerance in zip((self._before.get(ids[0]), parent, self.home), self.tolerance, strict=True):
            if node in prices and prices[node] <= least * tolerance:
                chosen = node
                break
        self.follow(ids, size_bytes, chosen)
        return chosen

    def follow(self, ids: Sequence[BlockId], size_bytes: int, node: str) -> None:
        """Note that the blocks `ids` of together `size_bytes` go to `node`, of which there is a report."""
        self._reports[node].take(size_bytes)
        for id in ids:
            self._before[id] = node
            self._before.move_to_end(id)
        while len(self._before) > self.remember_blocks:
            self._before.popitem(last=False)
