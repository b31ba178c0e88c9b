"""A node's memory as its readers on the same host see it: blocks are copied from it, and marks say whether they still were the blocks'."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from kvstore.arena import MARK_BYTES
from kvstore.arena.catalogue import Catalogue
from kvstore.checked_copy import GO_ON, Copies, address_of, copy_rows, prepare
from kvstore.errors import CorruptBlockError, TransportError

from .planned import Plan

#: Blocks whose places are kept in mind, of one node; about 1 KB each.
MAX_PLANNED = 4096
#: Of a GPU's memory, so much is on its way to the host while what came before is copied on and checked.
PIECE_BYTES = 4 << 20
#: Runs so close together are copied in one go, with what is between them: a page's end.
GAP_BYTES = 4096


class SharedMemory:
    """Memory of one node.

    Parameters
    ----------
    mapped : uint8 [bytes]
        What the node shares of its host memory: marks, and before them the pages, unless those are a GPU's.
    catalogue : Catalogue, optional
        Of the blocks there.

    Attributes
    ----------
    is_device : bool
        Whether the pages are a GPU's.
    """

    is_device: ClassVar[bool] = False

    def __init__(self, mapped: np.ndarray, catalogue: Catalogue | None = None) -> None:
        self.catalogue = catalogue
        self._marks = mapped[: len(mapped) // MARK_BYTES * MARK_BYTES].view(np.uint64)
        self.size_bytes = len(mapped)
        #: Where pages begin, for `copy`.
        self.address = address_of(mapped)
        self._plans: OrderedDict[tuple[bytes, int], Plan] = OrderedDict()
        self._planned = 0
        self._remembering = threading.Lock()
        prepare()  # here, in the thread that opened the door, and not at the first copy, which may be made in an event loop

    def guess(self, keys: Sequence[bytes]) -> Plan | None:
        """Where these blocks were when they were last read together, if they still are there."""
        plan = self._plans.get((keys[-1], len(keys)))  # the last key stands for those before it, or else the guess is a wrong one
        return plan if plan is not None and self.sound(plan.marks) == len(plan.marks) else None

    def planned(self, keys: Sequence[bytes]) -> Plan | None:
        """Where these blocks are, or were a moment ago, by the node's catalogue; None unless it has all."""
        said = self.catalogue.find(keys) if self.catalogue is not None else None
        if said is None:
            return None
        plan = self._plans.get((keys[-1], len(keys)))
        if plan is None or plan.said != said:
            plan = Plan(said, len(keys), self)
        return plan if [header.key for header in plan.headers] == list(keys) else None

    def remember(self, keys: Sequence[bytes], plan: Plan) -> None:
        """These blocks were read, all of them, as `plan` says."""
        with self._remembering:
            if self._plans.pop((keys[-1], len(keys)), None) is None:
                self._planned += len(keys)
            self._plans[keys[-1], len(keys)] = plan
            while self._planned > MAX_PLANNED:
                (_, count), _ = self._plans.popitem(last=False)
                self._planned -= count

    def copy(self, rows: np.ndarray) -> None:
        """Copy out of here; see `copy_rows`."""
        copy_rows(rows)

    def sound(self, marks: np.ndarray) -> int:
        """How many leading marks, uint64 [marks, (place in the mapped memory, number there)], are as they were.

        Raises
        ------
        CorruptBlockError
            For a place outside.
        """
        if not len(marks):
            return 0
        places, states = marks.T
        if int(places.max()) // MARK_BYTES >= len(self._marks):
            raise CorruptBlockError("a plan of the door does not fit its arena")
        lost = self._marks[places // MARK_BYTES] != states
        return int(lost.argmax()) if lost.any() else len(marks)


class DeviceMemory(SharedMemory):
    """Memory of a node whose pages are a GPU's that this process uses too.

    Parameters
    ----------
    mapped : uint8 [bytes]
        The marks.
    remote : bytes
        The name of the pages, as the node says it (`kvstore.arena.cuda.RemoteName`).

    Raises
    ------
    TransportError
        Where they cannot be reached.
    """

    is_device = True

    def __init__(self, mapped: np.ndarray, remote: bytes) -> None:
        from kvstore.arena.cuda import RemoteName, attach

        super().__init__(mapped)
        self.pages = attach(RemoteName.from_bytes(remote))
        self.size_bytes, self.address = len(self.pages), 0

    def guess(self, keys: Sequence[bytes]) -> None:
        return None  # a GPU's memory is looked at only while the process that it belongs to answers

    def copy(self, rows: np.ndarray) -> None:
        copies = DeviceCopies(self.pages)
        for to, place, size, before in rows.tolist():
            copies.add(to, place, size, before == GO_ON)
        rows[:, 3] = copies.make()


class DeviceCopies:
    """As `Copies`, from a GPU's memory by way of pinned memory of the host.

    Parameters
    ----------
    pages : uint8 tensor [bytes]
    """

    def __init__(self, pages: Any) -> None:
        self._pages = pages
        self._rows: list[tuple[int, int, int, bool]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, to: int, address: int, size: int, goes_on: bool) -> None:
        """`size` bytes from place `address` of the pages to the host's address `to`; see `Copies.add`."""
        self._rows.append((to, address, size, goes_on))

    def make(self) -> Sequence[int]:
        """Copy everything, in order. Returns the CRC-32C of each.

        Raises
        ------
        TransportError
            When the GPU fails.
        """
        ranges, places = self._ranges()
        crcs: list[int] = []
        try:
            staged, came = self._send(ranges)
            for first, stop in self._batches():
                came[places[stop - 1][0]].synchronize()
                copies = Copies()
                for (to, _, size, goes_on), (_, at) in zip(self._rows[first:stop], places[first:stop], strict=True):
                    copies.add(to, staged.data_ptr() + at, size, goes_on)
                crcs += copies.make()
        except RuntimeError as error:
            raise TransportError(f"blocks could not be copied out of the GPU: {error}") from error
        return crcs

    def _ranges(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Ranges (start, bytes) of the pages that hold the rows; of each row the number of its range, and its place among their bytes."""
        ranges: list[tuple[int, int]] = []
        places, begins, total = [], 0, 0  # where the last range and what comes next begin among the bytes of all
        for _, address, size, _ in self._rows:
            start, length = ranges[-1] if ranges else (0, -1)
            if length < 0 or not 0 <= address - start - length <= GAP_BYTES:
                ranges.append((address, size))
                begins, total, start = total, total + size, address
            else:
                ranges[-1] = (start, address + size - start)
                total = begins + address + size - start
            places.append((len(ranges) - 1, begins + address - start))
        return ranges, places

    def _send(self, ranges: Sequence[tuple[int, int]]) -> tuple[Any, list[Any]]:
        """Have all ranges copied to memory of the host, one behind the other: that memory, and an event for each that it is there."""
        import torch

        staged = torch.empty(sum(size for _, size in ranges), dtype=torch.uint8, pin_memory=True)
        at, came = 0, []
        with torch.cuda.stream(torch.cuda.Stream(self._pages.device)):
            for start, size in ranges:
                staged[at : at + size].copy_(self._pages[start : start + size], non_blocking=True)
                at += size
                came.append(torch.cuda.Event())
                came[-1].record()
        return staged, came

    def _batches(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows to wait for and copy on together; none begins with a row that goes on."""
        first = size = 0
        for row, (_, _, more, goes_on) in enumerate(self._rows):
            if size >= PIECE_BYTES and not goes_on:
                yield first, row
                first, size = row, 0
            size += more
        if self._rows:
            yield first, len(self._rows)
